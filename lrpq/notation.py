"""Symbols used inside the algorithms; words are used at the boundaries.

Shapes:  T tokens, d_in inputs and d_out outputs of a linear layer, G groups of columns that share a scale.

    W  [d_out, d_in]   weights of a linear layer, y_t = W x_t
    Q  [d_out, d_in]   its quantized weights (dequantized values)
    X  [T, d_in]       inputs, one row a token;  Xq (X with a tilde) the same behind the quantized prefix
    g  [T, d_out]      gradients of the loss (nats) with respect to the outputs y
    s  [T]             token weights (relevance), non-negative
    c  [d_out]         output curvature, mean_t g_tj^2  (nats per unit of output squared)
    H  [d_in, d_in]    sum_t s_t x_t x_t^T / sum_t s_t, undamped
    U  [d_in, d_in]    upper triangular, U^T U = (H + damping)^-1
    E  [d_out, d_in]   GPTQ's column errors (W - Q)_j / U_jj
"""

BITS_PER_BYTE = 8
SCALE_BITS = 16  # scales are bfloat16 in the checkpoint

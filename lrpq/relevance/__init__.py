"""Layer-wise relevance propagation and Fisher information: how much every token and every output matters."""

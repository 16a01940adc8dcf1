"""What a layer is worth: the published measures of importance and ours, each a formula over the same evidence.

evidence.py    what is known of a module when its block has been walked back
curvature.py   second-order costs: Fisher, LRP, CP-LRP, their blend, Hessian trace
gradients.py   first-order and output-error costs: gradient x dW, grad^2 x dout^2
rankings.py    scores that rank: relevance magnitude, LIM, ZD
equal_loss.py  BAQ's rule
probe.py       measured KL divergence of single modules
joint.py       measured KL divergence of whole plans
shapley.py     what a block is worth among the others
measured.py    costs from measurements: one module at a time, and factors fitted by noise
registry.py    all of them under their standard names, with sources
"""

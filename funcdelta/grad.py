"""Derivatives with respect to params: gradients, Jacobian and Hessian products, taps, and unrolled training.

``value_and_grad`` computes the gradient of every member of a stack. The others take a function of one member's params;
map them over a stack with ``torch.vmap``.

>>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 2)), lora_r=1, modified_modules=["0"])
>>> losses, grads = fd.grad.value_and_grad(lambda p: delta.apply(p, torch.ones(3, 4)).square().mean())(delta.init(0))
>>> grads.keys() == delta.init(0).keys()
True
"""

from .derivatives.directions import conjugate_gradient, hvp, jacobian, jvp, per_sample_grads, vjp
from .derivatives.gradients import value_and_grad
from .derivatives.reach import reached
from .derivatives.taps import Tap, ghost_norms, kronecker_factors, taps
from .derivatives.unrolling import unroll
from .functional.attention import higher_order

__all__ = [
    "Tap",
    "conjugate_gradient",
    "ghost_norms",
    "higher_order",
    "hvp",
    "jacobian",
    "jvp",
    "kronecker_factors",
    "per_sample_grads",
    "reached",
    "taps",
    "unroll",
    "value_and_grad",
    "vjp",
]

"""Muon, the optimizer of OSP: momentum whose steps are made nearly orthogonal matrices.

Adam divides each entry of the gradient by that entry's own running size. This favours single
channels, and outliers grow there. Muon treats a weight matrix as a whole. It replaces the momentum
G = U S V^T by about U V^T: all directions move alike, and no channel is special (sec. 3.1).

Glossary: name here, symbol in the paper or its code, meaning
    newton_schulz   eq. 2            the approximate map G = U S V^T -> U V^T
    momentum        buf              running sum of gradients, buf = g + beta buf
    X, A, B         optimization.py  the iterate, its Gram matrix X X^T, and b A + c A^2

The paper gives only eq. 2. Momentum, the coefficients (Jordan 2024) and the factor 0.2 sqrt(max)
(Moonlight 2025) follow its released code, optimization.py.

Orthogonalizing only makes sense for matrices from channels to channels. Gains are only normalized.
The embedding, a table of which a batch reads few rows, stays with AdamW, as in the paper. So does
the head, which the paper does not mention.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn


def newton_schulz(G, steps: int = 5):
    """About U V^T for each matrix U S V^T in G [..., m, n]: all singular values become about 1.

    Each step applies the odd polynomial a s + b s^3 + c s^5 to every singular value s, using only
    matrix products. The coefficients give up convergence for speed: five steps take any s above
    0.003 (after the division by the norm) to between 0.7 and 1.2. That is good enough for a
    direction, and so is bf16, in which a GPU computes and returns it. (eq. 2)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = (G.bfloat16() if G.is_cuda else G).reshape(-1, *G.shape[-2:])  # [k, m, n]
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-8)  # now no singular value exceeds 1
    tall = G.shape[-2] > G.shape[-1]
    X = X.mT if tall else X  # wide, so that X X^T is the smaller Gram matrix
    for _ in range(steps):
        A = X @ X.mT  # [k, m, m]
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)  # a X + (b A + c A^2) X
    return (X.mT if tall else X).reshape(G.shape)


def muon_update(grads, momenta, beta: float = 0.95):
    """One Muon step for k tensors of the same shape: all matrices, all vectors or all scalars.

    Returns (update [k, ...], new momenta), the update for lr = 1. Modifies no argument. Updates are
    of fixed size: entries move by about 0.2 (root mean square), however small the gradient.
    """
    shape = grads[0].shape
    # no (1 - beta) on the gradient: the overall scale cancels below
    momenta = torch._foreach_add(list(grads), list(momenta), alpha=beta)
    in_bf16 = len(shape) == 2 and grads[0].is_cuda  # newton_schulz would cast it anyway
    u = grads[0].new_empty(len(grads), *shape, dtype=torch.bfloat16 if in_bf16 else None)
    for g, m, row in zip(grads, momenta, u):
        torch.add(g, m, alpha=beta, out=row)  # Nesterov: look one step ahead
    if len(shape) == 2:
        unit = newton_schulz(u)
    else:  # no singular values here: like the official code, divide by the 2-norm
        rows = u.view(len(u), -1)  # [k, n]; a single gain, n = 1, becomes its sign
        unit = (rows / (rows.norm(dim=1, keepdim=True) + 1e-8)).view_as(u)
    # m orthonormal rows of length n >= m have entries of about 1 / sqrt(n). sqrt(max) makes them
    # about 1, and 0.2 is the usual size of Adam's entries: so the same lr suits both.
    return 0.2 * math.sqrt(max(shape, default=1)) * unit, momenta


def parameter_groups(model: nn.Module) -> list[dict]:
    """Groups {"role", "params": [(name, tensor), ...]} that hold every parameter exactly once.

    A role follows from the module's type and name. Shape cannot tell: an embedding is 2-D as well.
    Raises ValueError, naming the parameter, where no rule fits (a bias, a convolution, ...).
    """
    groups, seen = {role: [] for role in ("embedding", "head", "matrix", "embproj", "gain")}, set()
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(prefix=module_name, recurse=False):
            leaf = module_name.rsplit(".", 1)[-1]
            if isinstance(module, nn.Embedding):
                role = "embedding"
            elif isinstance(module, nn.Linear) and p.ndim == 2:
                role = "head" if leaf == "head" else "embproj" if "embproj" in leaf else "matrix"
            elif name.endswith(".gain") or name == "gain":
                role = "gain"
            else:
                raise ValueError(f"{name} of a {type(module).__name__}: no rule gives it a role")
            if p not in seen:  # a tied head was seen as the embedding
                groups[role].append((name, p))
                seen.add(p)
    return [{"role": role, "params": params} for role, params in groups.items() if params]


def make_optimizers(model, optimizer: str, lr: float, embed_lr: float, weight_decay: float) -> list:
    """The optimizers of a run. Each of their groups has a "peak_lr", which the schedule scales.

    "adam" is AdamW for all. "muon" is AdamW at embed_lr for embedding and head, Muon for the rest.
    "muon-only" is Muon for all, the paper's dagger row. All weights decay, as in the paper's code.
    """
    to_adam, to_muon, optimizers = [], [], []
    for group in parameter_groups(model):
        is_table = group["role"] in ("embedding", "head")
        with_adam = optimizer == "adam" or optimizer == "muon" and is_table
        group["lr"] = group["peak_lr"] = embed_lr if with_adam and optimizer == "muon" else lr
        (to_adam if with_adam else to_muon).append(group)
    if to_muon:
        muon = dict(weight_decay=weight_decay, allow_tables=optimizer == "muon-only")
        optimizers.append(Muon(to_muon, lr, **muon))
    if to_adam:
        adamw = dict(lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)  # betas usual for LLMs
        fused = next(model.parameters()).is_cuda  # one kernel for all tensors
        optimizers.append(torch.optim.AdamW(to_adam, **adamw, fused=fused))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay, for one process or for any number of DDP ranks.

    `groups` come from parameter_groups(). A step also multiplies all weights, gains included, by
    1 - lr * weight_decay. Raises ValueError for an embedding or head, unless `allow_tables`, and
    for every parameter that is neither matrix nor gain.

    With torch.distributed, all ranks have the same averaged gradients and divide the work: each
    keeps the momenta and computes the updates of its share of the parameters, then all exchange
    the updates. Rank 0's state_dict() is complete, and loads on any number of ranks.
    """

    def __init__(self, groups, lr=5e-4, momentum=0.95, weight_decay=0.01, allow_tables=False):
        self.allow_tables, self.rank, self.world = allow_tables, 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group, params, share in self._shares():
            momenta = self._momenta(params, share)
            grads = [p.grad for p in share] or momenta  # an empty share: zeros, see _momenta
            update, momenta = muon_update(grads, momenta, group["momentum"])
            for p, momentum in zip(share, momenta):
                self.state[p]["momentum"] = momentum
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            updates = self._all_gathered(update, len(params)).unbind()
            torch._foreach_add_(params, updates, alpha=-group["lr"])
        return loss

    def add_param_group(self, group):
        if not isinstance(group, dict) or "role" not in group:
            raise ValueError("Muon wants groups with a role, as parameter_groups() makes them")
        group, role = dict(group, params=list(group["params"])), group["role"]
        for name, p in group["params"]:
            if role in ("embedding", "head") and not self.allow_tables:
                raise ValueError(f"{name} is a table ({role}): AdamW's, unless allow_tables=True")
            if p.ndim > 2 or (p.ndim < 2) != (role == "gain"):
                raise ValueError(f"{name} has shape {tuple(p.shape)}: neither matrix nor gain")
        super().add_param_group(group)

    # From here on: dividing the work among ranks.

    def _shares(self):
        """Yields (group, stack of equal shapes, this rank's share of the stack)."""
        for group in self.param_groups:
            # one process: skip what has no gradient. DDP gives every rank a gradient for all.
            trains = lambda p: p.requires_grad if self.world > 1 else p.grad is not None
            for params in stacks(filter(trains, group["params"]), self.world):
                size = -(-len(params) // self.world)
                yield group, params, params[self.rank * size : (self.rank + 1) * size]

    def _momenta(self, params, share):
        """The momenta of `share`, zero at first. For an empty share: one of zeros, to gather."""
        for p in share:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        return [self.state[p]["momentum"] for p in share] or [torch.zeros_like(params[0])]

    @torch.no_grad()
    def state_dict(self):
        """The state one process would have. All ranks must call it; only rank 0's is complete."""
        own = dict(self.state)  # what this rank keeps
        for _, params, share in self._shares() if self.world > 1 else ():
            momenta = self._all_gathered(torch.stack(self._momenta(params, share)), len(params))
            for p, momentum in zip(params, momenta) if self.rank == 0 else ():
                self.state[p] = dict(momentum=momentum.to("cpu", copy=True))  # a GPU is too small
            del momenta  # before the next stack is gathered
        complete = super().state_dict()
        self.state.clear()
        self.state.update(own)
        return complete

    def load_state_dict(self, state_dict):
        if self.world > 1:  # drop the other ranks' momenta before they reach the GPU
            share = {p for _, _, share in self._shares() for p in share}
            params = [p for group in self.param_groups for p in group["params"]]
            state = {i: state for i, state in state_dict["state"].items() if params[i] in share}
            state_dict = dict(state_dict, state=state)
        super().load_state_dict(state_dict)

    def _all_gathered(self, rows, k: int):
        """All k rows [k, ...] in order. Each rank has ceil(k / world) of them, the last fewer."""
        if self.world == 1:
            return rows
        padded = rows.new_zeros(-(-k // self.world), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.world * len(padded), *rows.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, padded)  # torch 2.13 renamed it
        return gathered[:k]


def stacks(params, world: int):
    """Cut parameters into stacks of equal shape: a few large matrix products, not many small ones.
    A stack has about 2^27 numbers per rank at most; more would cost memory and gain no time."""
    by_shape = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    for same in by_shape.values():
        n = -(-len(same) // max(1, world * 2**27 // same[0].numel()))  # number of stacks
        for i in range(n):
            yield same[i * len(same) // n : (i + 1) * len(same) // n]

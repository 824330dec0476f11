"""Muon, the optimizer of OSP: momentum whose every step is turned into a (nearly) orthogonal matrix.

Adam divides each number of the gradient by its own running size. That singles out coordinates: channels that happen
to be favoured are favoured again, and outliers grow along the axes. Muon treats a weight matrix as a matrix: of the
gradient G = U S V^T it keeps U V^T, so that every direction moves by the same amount and no channel is special (3.1).

Glossary: name here, symbol in the paper or its code, meaning
    newton_schulz   eq. 2          the approximate map G = U S V^T -> U V^T
    momentum        buf            heavy-ball sum of gradients, buf = g + beta buf
    X, A, B         optimization.py   the iterate and its Gram polynomials
Official implementation: dmis-lab/Outlier-Safe-Pre-Training, optimization.py. The paper gives no more than eq. 2;
momentum, coefficients (Jordan 2024) and the factor 0.2 sqrt(max) (RMS matching, Moonlight 2025) are that code's.

Two limits worth knowing. The step has a fixed size: the learning rate alone says how far the weights move, however
small the gradient (below about 1e-8 it fades out). And it only makes sense for matrices that map one set of channels to
another. An embedding is a table of rows, most of them untouched by a batch: it stays with AdamW, as in the paper, and
so does the head, of which the paper does not speak ("muon-only" is its dagger row, Muon for all).
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn


def newton_schulz(G, steps: int = 5):
    """Push the singular values of each matrix of G [..., m, n] towards 1: about U V^T where G = U S V^T. (eq. 2)

    Each step applies the odd polynomial a s + b s^3 + c s^5 to every singular value s, using matrix products only.
    The coefficients are tuned for speed, not for convergence: five steps bring everything that started above about
    0.003 to between 0.7 and 1.2, and that is all a step direction needs. So bf16 is enough too, where it is fast: on a
    GPU it is what comes back.

    One step is X <- Q X with Q = a I + b A + c A^2 and A = X X^T, which takes A to Q A Q. So several steps can be done
    on the small A alone, collecting P = ... Q2 Q1, and meet the wide X only at the end: a fifth fewer FLOP for an FFN
    matrix (n = 2.7 m), and none saved below n = 1.5 m. But rounding gives A slightly negative eigenvalues, which no
    X X^T has and every step multiplies by 12: after three steps, A is made anew.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = (G.bfloat16() if G.is_cuda else G).reshape(-1, *G.shape[-2:])  # [k, m, n]
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-8)  # Frobenius norm 1, so no singular value exceeds 1
    tall = G.shape[-2] > G.shape[-1]
    X = X.mT if tall else X  # X X^T is then the smaller of the two Gram matrices
    at_once = 3 if X.shape[-1] > 1.5 * X.shape[-2] else 1
    for first in range(0, steps, at_once):
        last = min(first + at_once, steps) - 1
        A, P = X @ X.mT, None
        for step in range(first, last + 1):
            Q = torch.baddbmm(A, A, A, beta=b, alpha=c)
            Q.diagonal(dim1=-2, dim2=-1).add_(a)
            P = Q if P is None else Q @ P
            if step < last:
                A = Q @ A @ Q
        X = P @ X
    return (X.mT if tall else X).reshape(G.shape)


def muon_update(grads, momenta, beta: float = 0.95):
    """One Muon step for k tensors of one shape: matrices, vectors or scalars, given as lists or stacks.

    Returns (update [k, ...], new momenta), the update per unit of learning rate. Changes no argument. Mind that the
    step has a fixed length: a gain vector moves by 0.2 lr sqrt(n) whatever its gradient, a single gain by 0.2 lr.
    """
    shape = grads[0].shape
    # heavy ball: no (1 - beta) in front of the gradient, its size cancels below
    momenta = torch._foreach_add(list(grads), list(momenta), alpha=beta)
    in_bf16 = len(shape) == 2 and grads[0].is_cuda  # newton_schulz would round anyway: write half the bytes
    u = grads[0].new_empty(len(grads), *shape, dtype=torch.bfloat16 if in_bf16 else None)
    for g, m, row in zip(grads, momenta, u):
        torch.add(g, m, alpha=beta, out=row)  # Nesterov: look one step ahead
    if len(shape) == 2:
        unit = newton_schulz(u)
    else:  # no singular values here: the official code divides by the 2-norm. For SSNorm's one number that is its sign.
        rows = u.view(len(u), -1)  # [k, n], n = 1 for scalars
        unit = (rows / (rows.norm(dim=1, keepdim=True) + 1e-8)).view_as(u)
    # m orthonormal rows of length n >= m have a typical entry of 1 / sqrt(n); sqrt(max) brings it to 1, and 0.2 is the
    # typical size of Adam's: at equal lr, equal steps
    return 0.2 * math.sqrt(max(shape, default=1)) * unit, momenta


def stacks(params, world: int):
    """Lists of parameters of equal shape, to be orthogonalized together: few large products instead of many small ones.
    A list has at most 2^27 numbers for each rank, 11 FFN matrices of the 1.4B model: more takes memory, not less time.
    """
    by_shape = {}
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    for same in by_shape.values():
        at_most = max(1, world * 2**27 // same[0].numel())
        lists = -(-len(same) // at_most)
        for i in range(lists):
            yield same[i * len(same) // lists : (i + 1) * len(same) // lists]


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(rows, k: int):
    """The k rows [k, ...] of which every rank has its share: k / ranks rounded up, so that the last may have fewer."""
    _, world = rank_and_world()
    if world == 1:
        return rows
    mine = rows.new_zeros(-(-k // world), *rows.shape[1:])
    mine[: len(rows)] = rows
    everyones = rows.new_empty(world * len(mine), *rows.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(everyones, mine)
    return everyones[:k]


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay, for one process or, under torch.distributed, for any number of equal replicas.

    Args:
        groups: dicts {"role": ..., "params": [(name, tensor), ...]}, as parameter_groups() makes them. The role is
            required because a shape does not tell a table of rows from a matrix of channels.
        lr: units of Adam-sized steps, see muon_update.
        weight_decay: a step multiplies the weights by 1 - lr * weight_decay; gains too, as in the official code.
        allow_tables: accept embedding and head too (the paper's "Muon without Adam" row).

    Every rank has the same averaged gradients, so the work is divided: of each stack a rank keeps the momentum of its
    share and computes its updates, and all get all updates. The state_dict() of rank 0 is whole, and loads at any
    number of ranks. Raises ValueError, naming the parameter, for what Muon must not be given.
    """

    def __init__(self, groups, lr=5e-4, momentum=0.95, weight_decay=0.01, allow_tables=False):
        self.allow_tables = allow_tables
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def add_param_group(self, group):
        if not isinstance(group, dict) or "role" not in group:
            example = "{'role': 'matrix', 'params': [(name, tensor), ...]}"
            raise ValueError(f"Muon wants groups with a role, {example}: see parameter_groups()")
        group = dict(group, params=list(group["params"]))
        for name, p in group["params"]:
            if group["role"] in ("embedding", "head") and not self.allow_tables:
                raise ValueError(
                    f"{name} is an {group['role']} table; give it to AdamW, or pass allow_tables=True to mean it"
                )
            if p.ndim > 2 or (p.ndim == 2) == (group["role"] == "gain"):
                raise ValueError(f"{name} has shape {tuple(p.shape)}; Muon takes matrices (2-D) and gains (0-D or 1-D)")
        super().add_param_group(group)

    def _stacks(self):
        """(group, stack, this rank's share of it) for every stack."""
        rank, world = rank_and_world()
        for group in self.param_groups:
            # one process leaves alone what has no gradient; of several, DDP makes sure that all that train have one
            there = [p for p in group["params"] if (p.requires_grad if world > 1 else p.grad is not None)]
            for params in stacks(there, world):
                share = -(-len(params) // world)
                yield group, params, params[rank * share : (rank + 1) * share]

    def _momenta(self, params, mine):
        """Those of `mine`, zero before the first step; a rank without a share makes up one, to have a row to send."""
        for p in mine:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        return [self.state[p]["momentum"] for p in mine] or [torch.zeros_like(params[0])]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group, params, mine in self._stacks():
            momenta = self._momenta(params, mine)
            grads = [p.grad for p in mine] or momenta
            update, momenta = muon_update(grads, momenta, group["momentum"])
            for p, momentum in zip(mine, momenta):
                self.state[p]["momentum"] = momentum
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, gathered(update, len(params)).unbind(), alpha=-group["lr"])
        return loss

    @torch.no_grad()
    def state_dict(self):
        """As one process would have it. Of several ranks all must call it; rank 0 gets the whole, the others less."""
        rank, world = rank_and_world()
        shares = dict(self.state)
        for _, params, mine in self._stacks() if world > 1 else ():
            everyones = gathered(torch.stack(self._momenta(params, mine)), len(params))
            if rank == 0:
                for p, momentum in zip(params, everyones):
                    self.state[p] = dict(momentum=momentum.to("cpu", copy=True))  # a GPU has no room for all
            del everyones  # before the next are made
        whole = super().state_dict()
        self.state.clear()
        self.state.update(shares)
        return whole

    def load_state_dict(self, state_dict):
        _, world = rank_and_world()
        if world > 1:  # leave out the others' shares, before they get to a GPU that has no room for all
            mine = {p for _, _, share in self._stacks() for p in share}
            params = [p for group in self.param_groups for p in group["params"]]
            kept = {i for i, p in enumerate(params) if p in mine}
            state_dict = dict(state_dict, state={i: s for i, s in state_dict["state"].items() if i in kept})
        super().load_state_dict(state_dict)


# Who is optimized by what. The module's type and name decide: an embedding has the shape of any matrix.

ROLES = (
    "embedding",  # a table of rows, of which a batch touches a few
    "head",  # one row per vocabulary entry
    "matrix",  # linear maps inside the blocks
    "embproj",  # the two D x D maps beside embedding and head
    "gain",  # scales of the norms, vectors (RMSNorm) or single numbers (SSNorm)
)


def parameter_groups(model: nn.Module) -> list[dict]:
    """Groups {"role", "params": [(name, tensor), ...]} that cover every parameter of `model` exactly once.

    Raises ValueError naming the first parameter that no rule covers (a bias, a convolution, ...).
    """
    groups = {role: [] for role in ROLES}
    seen = set()
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(prefix=module_name, recurse=False):
            last = module_name.rsplit(".", 1)[-1]
            if isinstance(module, nn.Embedding):
                role = "embedding"
            elif isinstance(module, nn.Linear) and p.ndim == 2:
                role = "head" if last == "head" else "embproj" if last.startswith("embproj") else "matrix"
            elif name.endswith(".gain") or name == "gain":
                role = "gain"
            else:
                raise ValueError(f"{name} belongs to a {type(module).__name__}: no rule says who optimizes it")
            if p not in seen:  # tied embeddings: the embedding came first
                groups[role].append((name, p))
                seen.add(p)
    return [{"role": role, "params": params} for role, params in groups.items() if params]


def make_optimizers(
    model, optimizer: str, lr: float, embed_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """The optimizers of a run. `optimizer`: "adam" (AdamW for all), "muon" (AdamW, at embed_lr, for embedding and head,
    Muon for the rest) or "muon-only". AdamW uses betas 0.9, 0.95, which the paper does not give; decay applies to all
    parameters, as in the official code. Each group carries "peak_lr", which the schedule scales.
    """
    tables, rest = [], []
    for group in parameter_groups(model):
        (tables if group["role"] in ("embedding", "head") else rest).append(group)
    to_adam, to_muon = {"adam": (tables + rest, []), "muon": (tables, rest), "muon-only": ([], tables + rest)}[
        optimizer
    ]
    made = []
    for group in to_adam:
        group["lr"] = lr if optimizer == "adam" else embed_lr
    if to_muon:
        made.append(Muon(to_muon, lr=lr, weight_decay=weight_decay, allow_tables=optimizer == "muon-only"))
    if to_adam:
        fused = next(model.parameters()).is_cuda  # one kernel for all tensors
        made.append(
            torch.optim.AdamW(to_adam, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay, fused=fused)
        )
    for each in made:
        for group in each.param_groups:
            group["peak_lr"] = group["lr"]
    return made


def optimizer_table(optimizers) -> str:
    """Lines "role / optimizer / lr / decay / tensors / parameters", one a group, to check before a run."""
    lines = [f"{'role':<10} {'optimizer':<9} {'lr':>8} {'decay':>6} {'tensors':>7} {'parameters':>13}"]
    for each in optimizers:
        for group in each.param_groups:
            n = sum(p.numel() for p in group["params"])
            lines.append(
                f"{group['role']:<10} {type(each).__name__:<9} {group['peak_lr']:>8.2g} {group['weight_decay']:>6.2g} "
                f"{len(group['params']):>7} {n:>13,}"
            )
    return "\n".join(lines)

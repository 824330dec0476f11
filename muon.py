"""Muon, the optimizer of OSP: momentum whose steps are made nearly orthogonal matrices.

Adam divides each entry of the gradient by that entry's own running size. This favours single
channels, and outliers grow there. Muon treats a weight matrix as a whole. It replaces the momentum
G = U S V^T by about U V^T: all directions move alike, and no channel is special (sec. 3.1).

Glossary: name here, symbol in the paper or its code, meaning
    newton_schulz   eq. 2            the approximate map G = U S V^T -> U V^T
    momentum        buf              running sum of gradients, buf = g + beta buf
    X, A            (Jordan's code)  the iterate, and its Gram matrix X X^T

The paper gives only eq. 2. Momentum, the coefficients (Jordan 2024) and the factor 0.2 sqrt(max)
(Moonlight 2025) follow its released code, optimization.py.

Orthogonalizing only makes sense for matrices from channels to channels. Gains are only normalized.
The embedding, a table of which a batch reads few rows, stays with AdamW, as in the paper. So does
the head, which the paper does not mention. On several GPUs each computes a share of the updates:
that is in nanoosp/divided.py.
"""

import math

import torch

# What a parameter can be
ROLES = ("embedding", "head", "matrix", "embproj", "gain")
TABLES = ("embedding", "head")  # they have a row for each token of the vocabulary


def newton_schulz(G, steps: int = 5):
    """About U V^T for each matrix U S V^T in G [..., m, n]: all singular values become about 1.

    Each step applies the odd polynomial a s + b s^3 + c s^5 to every singular value s, using only
    matrix products. The coefficients give up convergence for speed: five steps take any s above
    0.003 (after the division by the norm) to between 0.7 and 1.2. That is good enough for a
    direction, and so is bf16, in which a GPU computes and returns it. (eq. 2)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda else G
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-8)  # now no singular value exceeds 1
    tall = G.shape[-2] > G.shape[-1]
    X = X.mT if tall else X  # wide, so that X X^T is the smaller Gram matrix
    for _ in range(steps):
        A = X @ X.mT  # [..., m, m]
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def muon_update(grads, momenta, beta: float = 0.95):
    """One Muon step for k tensors of the same shape, stacked: grads [k, ...], momenta [k, ...].

    Returns (updates [k, ...] for lr = 1, new momenta). Modifies no argument. Updates are of fixed
    size: entries move by about 0.2 (root mean square), however small the gradient.
    """
    momenta = beta * momenta + grads  # no (1 - beta) on the gradient: the scale cancels below
    ahead = grads + beta * momenta  # Nesterov: look one step ahead
    if ahead.ndim == 3:
        unit = newton_schulz(ahead)
    else:  # gains have no singular values: like the official code, divide by the 2-norm
        rows = ahead.reshape(len(ahead), -1)  # [k, n]; a single gain, n = 1, becomes its sign
        unit = (rows / (rows.norm(dim=1, keepdim=True) + 1e-8)).view_as(ahead)
    # m orthonormal rows of length n >= m have entries of about 1 / sqrt(n). sqrt(max) makes them
    # about 1, and 0.2 is the usual size of Adam's updates: so the same lr suits both.
    return 0.2 * math.sqrt(max(ahead.shape[1:], default=1)) * unit, momenta


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay. A step also multiplies all weights, gains included, by
    1 - lr * weight_decay.

    `groups` come from parameter_groups(). Raises ValueError for an embedding or head, unless
    `allow_tables`, and for every parameter that is neither matrix nor gain.
    """

    def __init__(self, groups, lr=5e-4, momentum=0.95, weight_decay=0.01, allow_tables=False):
        self.roles = [role for role in ROLES if allow_tables or role not in TABLES]
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for params in self.trained(group):
                updates = self.updates(params, group["momentum"]).to(params[0].dtype)
                # _foreach_: the same for every tensor of a list, in one kernel, as torch.optim does
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(params, updates.unbind(), alpha=group["lr"])

    def trained(self, group):
        """The parameters of a group that have a gradient, in lists of equal shape."""
        return same_shapes(p for p in group["params"] if p.grad is not None)

    def updates(self, params, beta: float):
        """muon_update() of parameters of equal shape, [k, ...]. Momenta are kept, zero at first."""
        grads = torch.stack([p.grad for p in params])
        old = [self.state[p]["momentum"] if self.state[p] else torch.zeros_like(p) for p in params]
        update, momenta = muon_update(grads, torch.stack(old), beta)
        for p, momentum in zip(params, momenta):
            self.state[p]["momentum"] = momentum
        return update

    def add_param_group(self, group):
        if "role" not in group:
            raise ValueError("Muon wants groups with a role, as parameter_groups() makes them")
        for name, p in group["params"]:  # torch.optim takes pairs, too, and keeps the tensors
            fits = p.ndim < 2 if group["role"] == "gain" else p.ndim == 2
            if group["role"] not in self.roles or not fits:
                raise ValueError(f"{name} {tuple(p.shape)}, {group['role']}: Muon is not for it")
        super().add_param_group(group)


def same_shapes(params, limit: int = 2**27):
    """Lists of parameters of equal shape and type: a few large matrix products, not many small
    ones. A list has about `limit` numbers at most; more would cost memory and gain no time."""
    alike = {}
    for p in params:
        alike.setdefault((p.shape, p.dtype), []).append(p)
    for same in alike.values():
        n = math.ceil(len(same) / max(1, limit // same[0].numel()))  # lists, about equally long
        for i in range(n):
            yield same[i * len(same) // n : (i + 1) * len(same) // n]


# Who is optimized by what


def role_of(name: str, p, module: torch.nn.Module) -> str:
    """One of ROLES, from a parameter's name and the module that has it. Shape cannot tell: an
    embedding is a matrix as well. Raises ValueError where no rule fits (a bias, a convolution)."""
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if isinstance(module, torch.nn.Linear) and p.ndim == 2:
        return "head" if "head" in name else "embproj" if "embproj" in name else "matrix"
    if name.split(".")[-1] == "gain":
        return "gain"
    raise ValueError(f"{name} of a {type(module).__name__}: no rule gives it a role")


def parameter_groups(model: torch.nn.Module) -> list[dict]:
    """Groups {"role", "params": [(name, tensor), ...]} that hold every parameter exactly once: a
    tied head as the embedding."""
    groups = {role: [] for role in ROLES}
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        groups[role_of(name, p, module)].append((name, p))
    return [{"role": role, "params": params} for role, params in groups.items() if params]


def make_optimizers(model, optimizer: str, lr, embed_lr, weight_decay, kind=Muon) -> list:
    """The optimizers of a run. Each of their groups has a "peak_lr", which the schedule scales.

    "adam" is AdamW for all. "muon" is AdamW at embed_lr for embedding and head, Muon for the rest.
    "muon-only" is Muon for all, the paper's dagger row. All weights decay, as in the paper's code.
    kind: the class of Muon; on several ranks DividedMuon, of nanoosp/divided.py.
    """
    with_adam = {"adam": ROLES, "muon": TABLES, "muon-only": ()}[optimizer]
    groups = parameter_groups(model)
    for group in groups:
        rate = embed_lr if optimizer == "muon" and group["role"] in TABLES else lr
        group.update(lr=rate, peak_lr=rate)
    to_muon = [group for group in groups if group["role"] not in with_adam]
    to_adam = [group for group in groups if group["role"] in with_adam]
    usual = dict(betas=(0.9, 0.95), fused=next(model.parameters()).is_cuda)  # one kernel
    muon = [kind(to_muon, weight_decay=weight_decay, allow_tables=not to_adam)] if to_muon else []
    adam = [torch.optim.AdamW(to_adam, weight_decay=weight_decay, **usual)] if to_adam else []
    return muon + adam

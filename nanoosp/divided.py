"""Muon divided among the ranks of torch.distributed: each of N GPUs orthogonalizes an Nth of the matrices.

DDP gives every rank the same averaged gradients. Of each list of equal shapes a rank takes a share: it keeps the
momenta and computes the updates of that share alone, then all ranks exchange their updates. Rank 0's state_dict() is
what one process would have, and it loads on any number of ranks.
"""

import math

import torch
import torch.distributed as dist

from muon import Muon, muon_update, same_shapes


class DividedMuon(Muon):
    def __init__(self, groups, **options):
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        super().__init__(groups, **options)

    def trained(self, group):
        """Lists of all that is trained: DDP has a gradient for all of it. With more ranks to share them, lists may be
        longer."""
        return same_shapes((p for p in group["params"] if p.requires_grad), limit=self.world * 2**27)

    def share(self, params):
        """This rank's part of a list. The last rank's may be shorter; where ranks outnumber tensors, some have none."""
        size = math.ceil(len(params) / self.world)
        return params[self.rank * size : (self.rank + 1) * size]

    def updates(self, params, beta: float):
        mine = self.share(params)
        if mine:
            update = super().updates(mine, beta)
        else:  # this rank sends no row, but it has to know the type of the others'
            nothing = torch.stack(params[:1])
            update = muon_update(nothing, nothing, beta)[0][:0]
        return self.all_gathered(update, len(params))

    def all_gathered(self, rows, n: int):
        """All n rows [n, ...] in order, of which each rank has those of its share."""
        padded = rows.new_zeros(math.ceil(n / self.world), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.world * len(padded), *rows.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed it
        gather(gathered, padded)
        return gathered[:n]

    @torch.no_grad()
    def state_dict(self):
        """The state one process would have. All ranks must call it; only rank 0's is complete."""
        complete = super().state_dict()
        numbers = self.numbers()
        for group in self.param_groups:
            for params in self.trained(group):
                zero = torch.zeros_like(params[0])
                rows = [self.state[p].get("momentum", zero) for p in self.share(params)]
                momenta = self.all_gathered(torch.stack([*rows, zero])[:-1], len(params))  # there may be no rows
                if self.rank == 0:
                    for p, momentum in zip(params, momenta):
                        momentum = momentum.to("cpu", copy=True)  # a GPU is too small for everyone's
                        complete["state"][numbers[p]] = dict(momentum=momentum)
                del momenta  # before the next are gathered
        return complete

    def load_state_dict(self, state_dict):
        """Of a state of one process or of any number of ranks, take this rank's share."""
        numbers = self.numbers()
        mine = {numbers[p] for group in self.param_groups for params in self.trained(group) for p in self.share(params)}
        state = {i: state for i, state in state_dict["state"].items() if i in mine}
        super().load_state_dict(dict(state_dict, state=state))

    def numbers(self) -> dict:
        """What state_dict() calls each parameter: its number in the order of the groups."""
        params = [p for group in self.param_groups for p in group["params"]]
        return {p: i for i, p in enumerate(params)}

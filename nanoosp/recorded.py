"""CUDA graphs: kernels that are recorded once and then started together, with a single call. For a
small model Python takes longer to start each kernel than it runs."""

import functools
import warnings

import torch


def record_training(model, rows: int, n_tokens: int):
    """Record model(tokens, targets), both [rows, n_tokens], and its backward; later calls replay them
    and take no other arguments. In eval mode the model runs as before. Weights may change, but not
    move in memory. Every backward writes its gradients to the same place, so there can be only one
    a step."""
    example = torch.zeros(rows, n_tokens, dtype=torch.long, device=model.embed.weight.device)
    # Gradients are added up on another stream than the graph was recorded on, as they should be
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    torch.cuda.make_graphed_callables(model, (example, example.clone()))


class Recorded:
    """function(*tensors) -> tensors, recorded on CUDA at the first call.

    Later calls must bring tensors of the same shapes. Each call overwrites the last one's results.
    Elsewhere it is the function itself.
    """

    def __init__(self, function):
        self.function, self.graph = function, None

    def __call__(self, *tensors):
        if not tensors[0].is_cuda:
            return self.function(*tensors)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in tensors]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # not recorded: what is compiled or chosen is so here
                self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = self.function(*self.inputs)
        for mine, given in zip(self.inputs, tensors):
            mine.copy_(given)
        self.graph.replay()
        return self.results


def recorded(function):
    """Decorator: function(*tensors, *others) is Recorded for each set of shapes and of others, which
    must be hashable. Results are overwritten by the next call with the same."""

    @functools.lru_cache(maxsize=8)  # a graph keeps its memory
    def graph_for(shapes, others):
        return Recorded(lambda *tensors: function(*tensors, *others))

    @functools.wraps(function)
    def run(*args):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        shapes = tuple((x.shape, x.dtype, x.device) for x in tensors)
        return graph_for(shapes, args[len(tensors):])(*tensors)

    return run

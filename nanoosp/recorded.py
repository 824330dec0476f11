"""CUDA graphs: kernels that are recorded once and then started together, with a single call. For a
small model Python takes longer to start each kernel than it runs."""

import functools

import torch


class Recorded:
    """function(*tensors, *others) -> tensors, recorded on CUDA once for all tensors of these shapes and these others,
    which must be hashable. Elsewhere it is the function itself. Also a decorator.

    Each call overwrites the results of the last one with the same shapes and others.
    """

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function
        self.graphs = {}

    def __call__(self, *args):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        others = args[len(tensors):]
        if not tensors[0].is_cuda:
            return self.function(*args)
        key = others, *((x.shape, x.dtype, x.device) for x in tensors)
        if key not in self.graphs:
            if len(self.graphs) == 8:  # they take memory: forget the oldest
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = self.record(tensors, others)
        graph, inputs, results = self.graphs[key]
        for mine, given in zip(inputs, tensors):
            mine.copy_(given)
        graph.replay()
        return results

    def record(self, tensors, others):
        """(graph, tensors that it reads, tensors that it writes)"""
        inputs = [tensor.clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # not recorded: what is compiled or chosen is so here
            self.function(*inputs, *others)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.function(*inputs, *others)
        return graph, inputs, results

"""Hadamard matrices: entries +-1 with H H^T = n I. Divided by sqrt(n) they are rotations that
spread whatever is in one channel evenly over all. They are built here, not looked up.

quantize.py needs hadamard_transform alone. The rest says how to make one for any width.
"""

import functools
import math

import torch


def hadamard_transform(x):
    """x @ hadamard(n) along the last axis of x [..., n], as two small products. That takes
    n (K + n/K) multiplications instead of n^2.

    In fp32 or finer, also under autocast; returned in the dtype of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    H, S = hadamard_factors(x.shape[-1], x.device, dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = H @ x.to(dtype).unflatten(-1, (len(H), len(S))) @ S  # [..., K, n/K]
    return y.flatten(-2).to(x.dtype)


def hadamard(n: int):
    """The whole matrix, H^T kron S, [n, n] in fp64. Orthogonal, but not always symmetric."""
    H, S = hadamard_factors(n)
    return torch.kron(H.mT.contiguous(), S)


@functools.lru_cache
def hadamard_factors(n: int, device="cpu", dtype=torch.float64):
    """Orthogonal (H [K, K], S [n/K, n/K]) that make up hadamard(n): S is Sylvester's, and H is
    whatever fits the odd part of n.

    The last resort, Hartley's matrix, is no Hadamard matrix. A random rotation would be worse: for
    a lone outlier it loses half of what a Hadamard matrix gains.
    """
    power = n & -n  # the largest power of two in n
    odd = n // power
    if odd == 1:
        H = sylvester(2 ** ((power.bit_length() - 1) // 2))  # Sylvester(ab) = Sylvester(a) kron (b)
    elif odd == 43 and power >= 4:
        H = williamson_172()
    else:
        candidates = (paley(odd * 2**a) for a in range(2, power.bit_length()))
        H = next((H for H in candidates if H is not None), None)
        H = hartley(odd) if H is None else H
    S = sylvester(n // len(H))
    return (H / len(H) ** 0.5).to(device, dtype), (S / len(S) ** 0.5).to(device, dtype)


# "Order" is the number of rows.


def sylvester(n: int):
    """Order n = 2^t: H_2n = [[H_n, H_n], [H_n, -H_n]], starting from [1]."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    return H


def williamson_172():
    """Order 172, for the paper's FFN of 5504 = 172 * 32: four symmetric circulant matrices whose
    squares add up to 172 I, arranged like a quaternion (Williamson 1944). In a circulant matrix
    each row is the one above it, moved right by one."""

    def circulant(bits: int):
        signs = [1.0 if bits >> (42 - i) & 1 else -1.0 for i in range(43)]
        row = torch.tensor(signs, dtype=torch.float64)
        return torch.stack([row.roll(k) for k in range(43)])

    A, B, C, D = map(circulant, (0x467AECDD798, 0x6FC29B650FD, 0x7595E85EA6B, 0x63D260192F1))
    rows = [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def is_prime(q: int) -> bool:
    return q > 1 and all(q % i for i in range(2, math.isqrt(q) + 1))


def paley(order: int):
    """Order q + 1 (q a prime, q % 4 == 3) or 2 (q + 1) (q % 4 == 1), from which numbers are squares
    modulo q (Paley 1933). None if `order` is neither."""
    one, two = order - 1, order // 2 - 1
    q = one if is_prime(one) and one % 4 == 3 else two
    if q == two and not (order % 4 == 0 and is_prime(q) and q % 4 == 1):
        return None
    chi = -torch.ones(q, dtype=torch.float64)  # Legendre symbol: squares 1, others -1, zero 0
    chi[[i * i % q for i in range(1, q)]] = 1
    chi[0] = 0
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    i = torch.arange(q)
    C[1:, 1:] = chi[(i[:, None] - i) % q]
    C[0, 1:], C[1:, 0] = 1, -1 if q == one else 1
    identity = torch.eye(q + 1, dtype=torch.float64)
    if q == one:
        return C + identity
    plus, minus = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
    return torch.kron(C, plus) + torch.kron(identity, minus)


def hartley(m: int):
    """Any order: a real Fourier transform. Orthogonal, but its entries are of several sizes, up to
    sqrt(2)."""
    angle = 2 * math.pi / m * (torch.outer(torch.arange(m), torch.arange(m)) % m).double()
    return angle.cos() + angle.sin()

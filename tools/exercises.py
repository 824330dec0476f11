"""The exercises of docs/lesson.ipynb. A cell ends with the check of what was written in it, as in

    exercises.check_orthogonal(orthogonal, G)

A check says what is missing or wrong, or else what a right answer shows of the lesson's models. It
only prints, so that the lesson runs on whatever the answer is.
"""

import functools

import torch

from muon import newton_schulz
from quantize import Int


class NotYet(Exception):
    """What is missing or wrong, in a sentence."""


def exercise(check):
    """Turns check(answer, ...), which returns a text or raises NotYet, into what a cell calls."""

    @functools.wraps(check)
    def tell(answer, *shown):
        name = answer.__name__

        def answered(*given):
            value = answer(*given)
            if value is ...:
                raise NotYet(f"put your code in place of the dots in {name}()")
            if value is None:
                raise NotYet(f"{name}() returns nothing")
            return value

        try:
            with torch.no_grad():
                print("Right.", check(answered, *shown))
        except NotYet as problem:
            print(f"Not yet: {problem}.")
        except Exception as error:  # an answer may raise anything
            print(f"Not yet: {name}() stops with {type(error).__name__}: {error}")

    return tell


def same(value, expected, hint: str):
    """Raises NotYet unless `value` has the shape of `expected`, and with the hint unless it is the
    same but for rounding."""
    value, expected = torch.as_tensor(value), torch.as_tensor(expected)
    if value.shape != expected.shape:
        raise NotYet(f"the shape is {[*value.shape]}, but should be {[*expected.shape]}")
    if not torch.allclose(value.double(), expected.double(), rtol=1e-4, atol=1e-4):
        raise NotYet(hint)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def rotation(n: int):
    """A random orthogonal matrix [n, n], which is not symmetric."""
    return torch.linalg.qr(random(n, n))[0]


@exercise
def check_orthogonal(orthogonal, G):
    """orthogonal(G [m, n]) is U V^T for G = U S V^T. Shows how near newton_schulz comes to it."""
    for shape in ((6, 4), (4, 6)):
        example = random(*shape)
        U, S, Vt = torch.linalg.svd(example, full_matrices=False)
        result = orthogonal(example)
        same(result.shape, shape, f"a matrix of shape {[*shape]} became one of {[*result.shape]}: "
             "try full_matrices=False")
        same(torch.linalg.svdvals(result), torch.ones(4), "its singular values are not all 1")
        same(result, U @ Vt, "its singular values are all 1, but it does not point where G does. "
             "torch.linalg.svd returns U, S and V^T, so V^T need not be transposed again")
    cosine = torch.cosine_similarity(orthogonal(G).flatten(), newton_schulz(G).flatten(), dim=0)
    return f"newton_schulz(G) points almost there: the cosine between the two is {cosine:.3f}."


@exercise
def check_special(special, functions, D: int):
    """special(f, x, Q) is |f(xQ) - f(x)Q| / |f(x)|. Shows it for `functions` of matrices [D, D], a
    dict by name."""
    x, Q = random(8, 8), rotation(8)
    same(special(lambda x: 3 * x, x, Q), 0.0, "for f(x) = 3x it should be 0, because it does not "
         "matter whether one rotates before it or after")
    f = torch.sign
    expected = (f(x @ Q) - f(x) @ Q).norm() / f(x).norm()
    same(special(f, x, Q), expected, f"for f = torch.sign it should be {expected:.3f} here. Take "
         "f(x @ Q) less f(x) @ Q, and divide the norm of the difference by that of f(x)")
    f = torch.relu  # here |f(xQ)| is not |f(x)|, and |f(x)| not a whole number
    expected = (f(x @ Q) - f(x) @ Q).norm() / f(x).norm()
    same(special(f, x, Q), expected, f"for f = torch.relu it should be {expected:.3f} here. Divide "
         "by the norm of f(x)")
    x, Q = random(D, D), rotation(D)
    rows = [f"    {name:<36} {abs(float(special(f, x, Q))):.2f}" for name, f in functions.items()]
    return "\n".join(["How much each of these cares which channel is which:", *rows])


@exercise
def check_step_of_loss(step_of_loss, adam, osp):
    """step_of_loss(log, loss) is the first step in `log` whose "val_loss" is at most `loss`, or -1.
    Shows when `osp` reaches the last loss of `adam`; both are logs."""
    losses = (5.0, 3.0, 2.0, 2.5, 1.5)
    log = [dict(step=10 * i, val_loss=loss) for i, loss in enumerate(losses)]
    for loss, step, hint in ((3.0, 10, "a loss equal to the one asked for counts"),
                             (2.2, 20, "it is the first such step, even if the loss rises again"),
                             (1.0, -1, "if the loss is never reached it is -1")):
        same(step_of_loss(log, loss), step, f"{hint}. With losses of {losses} in steps 0, 10, 20, "
             f"30 and 40, the answer for a loss of {loss} is {step}")
    step, last = step_of_loss(osp, adam[-1]["val_loss"]), adam[-1]["step"]
    if step < 0:
        return f"OSP does not reach Adam's last loss in {last} steps."
    return f"OSP has Adam's loss of step {last} after {step} steps."


@exercise
def check_loudness(loudness, states, tokens):
    """loudness(x [T, D]) is the largest |x| of every token over its median |x|, [T]. Shows it for
    `states`, such x by name, on those of the `tokens` (bytes, [T]) where it is highest."""
    x = random(20, 7)
    size = x.abs()
    median = size.median(dim=1).values
    same(loudness(x), size.amax(dim=1) / median, "take absolute values first, and then both the "
         "largest and the median over the channels of one token, which are dim 1")
    rows = []
    for name, x in states.items():
        result = loudness(x)
        means = {token: float(result[tokens == token].mean()) for token in {*tokens.tolist()}}
        highest = sorted(means, key=means.get, reverse=True)[:3]
        where = ", ".join(f"{means[token]:.1f} on {chr(token)!r}" for token in highest)
        rows.append(f"    {name:<6} {result.mean():4.1f} on average; most, {where}")
    return "\n".join(["How far the loudest channel stands out:", *rows])


@exercise
def check_round_row(round_row, row):
    """round_row(w [n], bits, clip) is w rounded to a symmetric grid whose largest code stands for
    clip * max|w|. Shows which clip suits `row`."""
    w = torch.tensor([0.1, 0.6, 0.35, -0.7, -0.2])
    for bits, clip, hint in (
            (4, 1.0, "with 4 bits and clip = 1 the scale is max|w| / 7 = 0.1, so 0.6 stays as it "
                     "is. The codes are w / scale, rounded, and the result is scale * codes"),
            (3, 1.0, "with 3 bits the largest code is 3, not 7"),
            (4, 0.5, "with 4 bits the codes are clamped: to at least -8 and at most 7"),
            (3, 0.5, "with 3 bits the codes are clamped: to at least -4 and at most 3")):
        scale = clip * w.abs().max() / (2 ** (bits - 1) - 1)
        same(round_row(w, bits, clip), scale * Int(bits).code(w / scale), hint)
    clips = [1 - i / 20 for i in range(14)]
    errors = [float((round_row(row, 4, clip) - row).norm() / row.norm()) for clip in clips]
    error, clip = min(zip(errors, clips))
    return (f"Four bits move this row by {errors[0]:.1%} with clip = 1, and by {error:.1%} with "
            f"clip = {clip:.2f}.\nInt.scale() in quantize.py searches for every row's best clip.")


@exercise
def check_folded_head(folded_head, model, plain):
    """folded_head(head [V, D], P [D, D]) does to x what P and then head do. Compares it for `model`
    with the head of `plain`, which is model.fold()."""
    head, P = random(9, 6), random(6, 6)
    same(folded_head(head, P), head @ P, "P makes x @ P.T of x, and the head (x @ P.T) @ head.T of "
         "that. Which W has x @ W.T equal to it?")
    W = folded_head(model.head.weight, model.embproj_out.weight)
    far = (W - plain.head.weight).abs().max()
    return f"Your head differs from that of fold() by at most {far:.0e}."


@exercise
def check_round_rotated(round_rotated, H, vectors):
    """round_rotated(x [n, F], H [F, F], round) rotates by H, rounds, and rotates back. Shows what 4
    bits do to `vectors`, such x by name."""
    x, Q = random(5, 8), rotation(8)
    seen = []
    result = round_rotated(x, Q, lambda y: seen.append(y) or y)  # remembers y, and returns it
    if not seen:
        raise NotYet("round() is never called")
    same(seen[0], x @ Q, "what is rounded should be x @ H")
    same(result, x, "where round() changes nothing, x should come out again: H.T undoes H")
    same(round_rotated(x, Q, torch.sign), torch.sign(x @ Q) @ Q.T, "it is what round() returns "
         "that has to be rotated back")
    rows = []
    for name, x in vectors.items():
        both = Int(4).round(x), round_rotated(x, H, Int(4).round)
        plain, rotated = (float((rounded - x).norm() / x.norm()) for rounded in both)
        rows.append(f"    {name:<6} {plain:5.1%} as they are, {rotated:5.1%} while rotated")
    return "\n".join(["How far 4 bits move the values of the FFN's hidden state:", *rows])

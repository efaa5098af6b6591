"""Training whose step is one CUDA graph: for models so small that a GPU would wait for the host.

Beside the step nothing is launched, so what is in it (drawing a batch, losses, gradients, Muon and AdamW, the average
of the weights) must be the same operations on the same memory each time: rates and randomness are on the device.
On a CPU the step is computed as it is written.
"""

import math
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.optimizers import is_matrix, leave_out_cudnn_attention

WARM_UP_STEPS = 100


class GraphTraining:
    """`model` learns from `loss()`; `follower` is a copy of it that has its averaged weights after each step.

    Without `has_graph` steps are computed as they are written on a GPU, too: for losses that need the host. A record
    comes every `look_every` steps; between two of them the memory that `loss` reads may be filled anew.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[], Tensor], *, learning_rate: float, ema_decay: float,
        follower: nn.Module | None = None, has_graph: bool = True, look_every: int = 250,
    ):  # fmt: skip
        leave_out_cudnn_attention()
        self.loss, self.learning_rate, self.ema_decay = loss, learning_rate, ema_decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.trained = list(trained.values())
        self.device = self.trained[0].device
        is_on_gpu = self.device.type == "cuda"
        self.rate = torch.zeros((), device=self.device)
        self.muon = StackedMuon([p for name, p in trained.items() if is_matrix(name, p)])
        self.adamw = torch.optim.AdamW([p for name, p in trained.items() if not is_matrix(name, p)], lr=self.rate,
                                       betas=(0.9, 0.95), weight_decay=0.0, capturable=is_on_gpu,
                                       foreach=is_on_gpu)  # fmt: skip
        self.averages = [p.detach().clone() for p in self.trained]
        self.followers = list(follower.parameters()) if follower else []
        self.sum = torch.zeros((), device=self.device)
        self.has_graph, self.graph = has_graph and is_on_gpu, None
        self.look_every = look_every

    def run(self, seconds: float, last: float = 0.0) -> Iterator[dict]:
        """Train for so long, at least two steps, yielding records: a linear warm-up, then a cosine down to the `last`
        share of the rate.

        How many steps that will be is known from those that were taken.
        """
        begun, done, counted, num_steps = perf_counter(), 0, 0, 2
        self._capture()
        start = perf_counter()
        while done < num_steps:
            share = last + (1 - last) * (0.5 + 0.5 * math.cos(math.pi * done / num_steps))
            self.rate.fill_(self.learning_rate * share * min(1.0, (done + 1) / WARM_UP_STEPS))
            self._compute() if self.graph is None else self.graph.replay()
            done += 1
            if done in (2, 20) or done % self.look_every == 0 or done == num_steps:
                loss, counted = self.sum.item() / (done - counted), done
                self.sum.zero_()
                now = perf_counter()
                num_steps = max(done, int((seconds - (start - begun)) * done / (now - start)))
                yield {"step": done, "of": num_steps, "loss": loss, "seconds": now - begun}

    def agreement(self) -> float:
        """The cosine between the gradients of a step's loss and those that torch finds for it plainly: not compiled,
        attention written out."""
        with torch.random.fork_rng():
            found = self._gradients()
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
            plain = self._gradients()
        return nn.functional.cosine_similarity(found, plain, 0).item()

    @torch.no_grad()
    def put_averages(self) -> None:
        """Give the model its averaged weights."""
        torch._foreach_copy_(self.trained, self.averages)

    def _capture(self) -> None:
        """Compute some steps at a rate of 0, which compiles what is to be compiled, and keep one as a graph."""
        if not self.has_graph:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._compute()
        self.sum.zero_()

    def _gradients(self) -> Tensor:
        gradients = torch.autograd.grad(self.loss(), self.trained)
        return torch.cat([g.flatten().double() for g in gradients])

    def _compute(self) -> None:
        for p in self.trained:
            p.grad = None
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.muon.step(self.rate)
        self.adamw.step()
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.trained], 1 - self.ema_decay)
        if self.followers:
            torch._foreach_copy_(self.followers, self.averages)
        self.sum += loss.detach()


class StackedMuon:
    """`torch.optim.Muon` with all matrices of a shape in one product, and its learning rate a tensor."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01):
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in matrices:
            shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
        self.groups = [(some, torch.zeros(len(some), *shape, device=some[0].device)) for shape, some in shapes.items()]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """One step at a learning rate, a tensor without axes; updates are of the size of AdamW's."""
        for some, kept in self.groups:
            gradients = torch.stack([p.grad.reshape(kept.shape[1:]) for p in some])
            kept.lerp_(gradients, 1 - self.momentum)
            update = orthogonal(gradients.lerp(kept, self.momentum)) * (0.2 * max(kept.shape[1:]) ** 0.5 * rate)
            torch._foreach_mul_(some, 1 - rate * self.weight_decay)
            torch._foreach_sub_(some, [u.view(p.shape) for u, p in zip(update.unbind(), some, strict=True)])


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) of the same singular vectors and singular values near 1: five Newton-Schulz steps.

    Muon, https://kellerjordan.github.io/posts/muon; its coefficients.
    """
    x = matrices.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if is_tall else x).float()

"""The optimisers and their learning rates; what a step is here: clipped, gated where a gradient is not
finite, followed by the EMA.
"""
import torch


# ------------------------------------------------------------------------------------------------
# The optimisers.

def orthogonal(x, dtype):
    """Matrices (K, m, n) -> their singular vectors with all singular values about 1 (0.68 to 1.21), float32.

    Five Newton-Schulz steps of Muon's quintic, which is steep at 0 (Jordan et al., 2024), in dtype.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT                                                    # (K, m, m), of the shorter side
        bent = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, bent, x, beta=3.4445)
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Moves matrices by their orthogonalised Nesterov momentum (Jordan et al., 2024).

    The parameters of a group are each `parts` matrices, one below the other. No weight decay.
    """

    def __init__(self, groups, dtype):
        super().__init__(groups, {"lr": 0.02, "rate": "muon_lr", "momentum": 0.95, "parts": 1})
        self.dtype = dtype
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        """As update calls it: found_inf, on the device, is above 0 where nothing may change."""
        for group in self.param_groups:
            alike = {}  # of one shape: orthogonalised in one call
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for weights in alike.values():
                self._move(weights, group)

    def _move(self, weights, group):
        m, n = weights[0].shape
        buffers, keep = [self.state[p]["momentum"] for p in weights], self.found_inf > 0
        before, old = torch.stack(weights), torch.stack(buffers)          # (K, m, n)
        gradient = torch.stack([p.grad for p in weights])
        new = old.lerp(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(new, group["momentum"]).reshape(-1, m // group["parts"], n)
        size = group["lr"] * max(1, ahead.shape[1] / n) ** 0.5            # the published adjustment
        after = before - size * orthogonal(ahead, self.dtype).reshape(before.shape)
        torch._foreach_copy_(buffers, list(torch.where(keep, old, new)))
        torch._foreach_copy_(weights, list(torch.where(keep, before, after)))


class Both:
    """Two optimisers, each of parameters of its own, as one."""

    def __init__(self, *optimisers):
        self.optimisers = optimisers

    @property
    def param_groups(self):
        return [group for each in self.optimisers for group in each.param_groups]

    def step(self):
        for each in self.optimisers:
            each.found_inf, each.grad_scale = self.found_inf, self.grad_scale
            each.step()

    def zero_grad(self, set_to_none=True):
        for each in self.optimisers:
            each.zero_grad(set_to_none)

    def state_dict(self):
        return {"both": [each.state_dict() for each in self.optimisers]}

    def load_state_dict(self, state):
        for each, own in zip(self.optimisers, state["both"]):
            each.load_state_dict(own)


def adamw(parameters, blocks, beta2, precision):
    return torch.optim.AdamW(parameters, betas=(0.9, beta2), weight_decay=0.0, fused=True)


def muon(parameters, blocks, beta2, precision):
    """Muon for the matrices of the blocks, but for adaLN's; AdamW for the rest. Queries, keys and values are
    matrices of their own.
    """
    matrices = {name: p for name, p in blocks.named_parameters()
                if p.ndim == 2 and p.requires_grad and "adaLN" not in name}
    qkv = [p for name, p in matrices.items() if name.endswith("qkv.weight")]
    single = [p for name, p in matrices.items() if not name.endswith("qkv.weight")]
    groups = [{"params": qkv, "parts": 3}, {"params": single}]
    taken = set(map(id, matrices.values()))
    rest = [p for p in parameters if id(p) not in taken]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Both(Muon(groups, dtype), adamw(rest, blocks, beta2, precision))


# (parameters, the backbone's blocks, beta2, precision) -> an optimiser. A group's "rate" names the flag of
# its learning rate, without one it is lr.
OPTIMISERS = {"adamw": adamw, "muon": muon}


# ------------------------------------------------------------------------------------------------
# A step.

def schedule(step, warmup=0, decay_from=None, decay_to=None):
    """The learning rates' factor: up to 1 over so many steps; from 1 at decay_from to 0 at decay_to."""
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if decay_from is None:
        return factor
    left = (decay_to - step) / (decay_to - decay_from)
    return factor * min(1.0, max(0.0, left))


def set_rates(optimiser, rates, factor):
    """Give all groups factor times their rate of rates {name: value} -> {name: value} of those in use."""
    used = {}
    for group in optimiser.param_groups:
        name = group.get("rate", "lr")
        group["lr"] = used[name] = factor * rates[name]
    return dict(sorted(used.items()))


def update(parameters, optimiser):
    """Clip to norm 1 and step -> the gradient's norm, and 1.0 where it is not finite.

    Then the weights are left alone, without a host read.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    bad = (~torch.isfinite(norm)).float()
    optimiser.found_inf, optimiser.grad_scale = bad, None  # what a gradient scaler would tell the fused step
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return norm, bad


@torch.no_grad()
def update_ema(ema, model, step, ages=None):
    """EMA with the rate min(0.9999, (1 + n) / (10 + n)): a short run's average is not its initial weights.

    n is the step, of parameters whose average is older their ages {name: steps} more.
    """
    averages, weights = list(ema.parameters()), list(model.parameters())
    older = [ages.get(name, 0) for name, _ in model.named_parameters()] if ages else [0] * len(weights)
    for age in set(older):
        n, chosen = step + age, [i for i, own in enumerate(older) if own == age]
        rate = min(0.9999, (1 + n) / (10 + n))
        torch._foreach_lerp_([averages[i] for i in chosen], [weights[i] for i in chosen], 1 - rate)

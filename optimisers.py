"""What an optimiser's step is here: clipped, gated where a gradient is not finite, followed by the EMA."""
import torch


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

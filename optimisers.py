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
def update_ema(ema, model, step):
    """EMA with the rate min(0.9999, (1 + n) / (10 + n)): a short run's average is not its initial weights."""
    rate = min(0.9999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - rate)

"""Say what an optimizer step of PPO trains, and at which rate: the value's learning rate, and the warm-up of the value."""

import torch


class Optimizing:
    """Mixin for an online trainer of a `Backbone` whose policy and value train."""

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Override `create_optimizer`: give the value its own learning rate, if `value_learning_rate` is set.

        With Adam the weight of the value loss hardly changes the size of the value's steps, but its learning rate does.
        """
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rate = self.args.value_learning_rate
        if rate is not None and not made:
            policy, value = ({id(p) for p in self.model.role_parameters(role)} for role in ("policy", "value"))
            value -= policy  # a value that is only a head runs on the policy's adapter
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in value]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in value]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def _check_deepspeed(self) -> None:
        """Raise a ValueError for an option that DeepSpeed cannot serve."""
        for name in ("max_approx_kl", "critic_warmup_updates"):
            if self.is_deepspeed_enabled and getattr(self.args, name):
                raise ValueError(
                    f"{name}={getattr(self.args, name)} is not supported by DeepSpeed: it leaves gradients out of optimizer "
                    f"steps, and DeepSpeed takes each step together with the backward pass. Leave {name} unset, or launch "
                    f"with accelerate_configs/ddp.yaml or fsdp2.yaml."
                )

    @property
    def warming_up(self) -> bool:
        """Return whether only the value trains, as in the first updates (`critic_warmup_updates`)."""
        return self._step < self.args.critic_warmup_updates * self.steps_per_update

"""Arguments of [`LasarGRPOTrainer`]."""

from dataclasses import dataclass, field

from trl import GRPOConfig

from ..arguments import check_choices
from .losses import DISTANCES
from .sharding import refuse_unused_search


@dataclass
class LasarGRPOConfig(GRPOConfig):
    r"""
    Configuration of [`LasarGRPOTrainer`]. All other arguments are inherited from [`~trl.GRPOConfig`].

    Args:
        sampling (`str`, *optional*, defaults to `"sample"`):
            How the candidates of a group are drawn. `"sample"` draws them independently, which gives the gradient of
            the expected reward. `"stochastic_beams"` draws distinct items, so that even a policy that is almost
            certain compares `G` items. But they are not weighted by their chance of being drawn, so the gradient is
            biased: with a target of probability .99 it is about 30 times too large.
        alignment (`str`, *optional*, defaults to `"kl"`):
            Distance of the terminal anchor loss: `"kl"`, `"cosine"`, `"mse"` or `"none"`.
        terminal_weight (`float`, *optional*, defaults to `0.1`):
            Weight `γ_KL` of the terminal anchor loss.
        depth_weight (`float`, *optional*, defaults to `0.1`):
            Weight `γ_RF` of REINFORCE on the depth policy. At 0 the policy head is frozen.
        step_cost (`float`, *optional*, defaults to `0.005`):
            Cost `λ` of one latent step, in units of reward.
        depth_entropy_weight (`float`, *optional*, defaults to `0.01`):
            Weight `η` of the entropy bonus of the depth policy.
        baseline_decay (`float`, *optional*, defaults to `0.95`):
            Decay of the running mean `b_EMA` of the group rewards.
        prompts_per_user (`int`, *optional*, defaults to `1`):
            Number of prompts of one user, with histories that continue one another, that stay together in the order of
            training. Together they are read once; more of them make a step faster and its gradient less diverse.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `beta`: Defaults to `0.04` instead of `0.0`. The paper keeps a KL penalty to the stage-2 model.
    > - `loss_type`: Defaults to `"grpo"` instead of `"dapo"`. All answers have the same length, so `"dapo"`, `"bnpo"`
    >   and `"dr_grpo"` are the same. `"cispo"` clips ratios at `epsilon_high`, which needs a value such as `5.0`.
    > - `scale_rewards`, `multi_objective_aggregation`: As in TRL, for the candidates. The depth policy always learns
    >   from the weighted sum of the rewards.
    > - `learning_rate`: Defaults to `1e-5` instead of `1e-6`.
    > - `max_completion_length`: Defaults to `4` instead of `512`. The trainer sets it to the number of SID levels.
    > - `disable_dropout`: Defaults to `True` instead of `False`. Candidates are drawn without dropout, so they are
    >   scored without it.
    > - `use_bias_correction_kl`: Pinned to `True`, the unbiased gradient of the KL penalty; GRPO's paper has `False`.
    > - `router_aux_loss_coef`: Pinned to `0.0` instead of `None`. The latent loop returns no router loss.
    > - `ddp_find_unused_parameters`: Defaults to `False`, which `None` means too. `True` is refused: the search fails
    >   on the policy head.
    """

    beta: float = field(default=0.04, metadata={"help": "Weight of the KL penalty to the stage-2 model."})
    loss_type: str = field(default="grpo", metadata={"help": "Aggregation of the policy-gradient loss."})
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    max_completion_length: int | None = field(default=4, metadata={"help": "Set to the number of SID levels."})
    disable_dropout: bool = field(default=True, metadata={"help": "Score candidates as drawn, without dropout."})
    sampling: str = field(
        default="sample", metadata={"help": "How candidates are drawn.", "choices": ["sample", "stochastic_beams"]}
    )
    alignment: str = field(
        default="kl", metadata={"help": "Distance of the terminal anchor loss.", "choices": [*DISTANCES, "none"]}
    )
    terminal_weight: float = field(default=0.1, metadata={"help": "Weight of the terminal anchor loss, gamma_KL."})
    depth_weight: float = field(default=0.1, metadata={"help": "REINFORCE weight, gamma_RF; 0 freezes the policy."})
    step_cost: float = field(default=0.005, metadata={"help": "Cost of one latent step in units of reward, lambda."})
    depth_entropy_weight: float = field(default=0.01, metadata={"help": "Entropy bonus of the depth policy, eta."})
    baseline_decay: float = field(default=0.95, metadata={"help": "Decay of the running mean of the group rewards."})
    prompts_per_user: int = field(default=1, metadata={"help": "Prompts of a user that stay together; read once."})
    use_bias_correction_kl: bool = field(default=True, metadata={"help": "Unbiased gradient of the KL penalty."})
    router_aux_loss_coef: float | None = field(default=0.0, metadata={"help": "Keep it at 0."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Keep it at False."})

    def __post_init__(self):
        check_choices(self)
        if self.router_aux_loss_coef != 0:
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, but no router loss is added; expected 0."
            )
        refuse_unused_search(self)
        super().__post_init__()

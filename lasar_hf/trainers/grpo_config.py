"""Arguments of [`LasarGRPOTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import GRPOConfig

from ..arguments import check_choices
from .hub import check_hub_strategy
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
        policy_learning_rate (`float`, *optional*):
            Learning rate of the policy head. Defaults to `learning_rate`. The head is small and new, so it may need a
            much larger one than weights that should hardly change.
        depth_gradient (`str`, *optional*, defaults to `"reinforce"`):
            Gradient of the depth policy. `"reinforce"`: from the one depth that was drawn for a prompt, as in the
            paper. `"exact"`: from all depths of the prompt, whose rewards `log p(target | N)` come from one chain of
            latent steps, see [`~lasar_hf.trainers.exact_depth_loss`]; it moves the policy head alone.
        depth_reward (`str`, *optional*, defaults to `"mean"`):
            Reward of a group, `R_group`, for `"reinforce"`. `"mean"`: mean of the candidates' rewards, as in the
            paper. `"rank"`: `1 / log2(r + 1)` with the rank `r` of the target among the distinct candidates, 0
            without it, which is on the scale of NDCG.
        fixed_depth (`int`, *optional*):
            Draw all candidates after this number of latent steps instead of the policy's. Needs `depth_weight=0`.
        step_cost (`float` or `"auto"`, *optional*, defaults to `0.005`):
            Cost `λ` of one latent step, in units of reward. `"auto"`, for `depth_gradient="exact"`: the deepest
            chain costs half of what the best depth of a prompt gains over the first one, as a mean over the first
            batch.
        step_cost_warmup (`float`, *optional*, defaults to `0.0`):
            Part of all steps in which the cost rises linearly from 0.
        depth_entropy_weight (`float`, *optional*, defaults to `0.01`):
            Weight `η` of the entropy bonus of the depth policy.
        baseline_decay (`float`, *optional*, defaults to `0.95`):
            Decay of the running mean `b_EMA` of the group rewards.
        drop_groups_without_signal (`bool`, *optional*, defaults to `False`):
            Leave groups whose candidates all have the same reward out of `L_GRPO`, which then is a mean over the
            other groups. They have no policy gradient, only a KL penalty. The other losses still use them, so the
            depth policy is not biased. Not with an entropy bonus of TRL (`entropy_coef`, `use_adaptive_entropy`).
        prompts_per_user (`int`, *optional*, defaults to `1`):
            Number of prompts of one user, with histories that continue one another, that stay together in the order of
            training. Together they are read once; more of them make a step faster and its gradient less diverse.
        license (`str`, *optional*):
            Licence of the checkpoint, such as `"apache-2.0"`, for its model card. Defaults to that of the checkpoint
            that the training began with. A card without a licence says so.
        dataset (`str`, *optional*):
            Name of the data set, for the model card. Defaults to the names of its files, if they are known.

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
    policy_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the policy head; that of the other weights if unset."}
    )
    depth_gradient: str = field(
        default="reinforce",
        metadata={"help": "Depth policy: from the drawn depth, or all.", "choices": ["reinforce", "exact"]},
    )
    depth_reward: str = field(
        default="mean", metadata={"help": "Reward of a group for reinforce.", "choices": ["mean", "rank"]}
    )
    fixed_depth: int | None = field(default=None, metadata={"help": "Latent steps of all candidates; no policy."})
    # A parser of `float | str` would refuse "auto", so this is text that `__post_init__` reads.
    step_cost: str = field(
        default="0.005", metadata={"help": "Cost of one latent step in units of reward, lambda, or auto."}
    )
    step_cost_warmup: float = field(default=0.0, metadata={"help": "Part of the steps in which the cost rises."})
    depth_entropy_weight: float = field(default=0.01, metadata={"help": "Entropy bonus of the depth policy, eta."})
    baseline_decay: float = field(default=0.95, metadata={"help": "Decay of the running mean of the group rewards."})
    drop_groups_without_signal: bool = field(
        default=False, metadata={"help": "Leave groups of equal rewards out of the policy gradient and its KL."}
    )
    prompts_per_user: int = field(default=1, metadata={"help": "Prompts of a user that stay together; read once."})
    use_bias_correction_kl: bool = field(default=True, metadata={"help": "Unbiased gradient of the KL penalty."})
    router_aux_loss_coef: float | None = field(default=0.0, metadata={"help": "Keep it at 0."})
    license: str | None = field(default=None, metadata={"help": "Licence of the model, such as mit, for its card."})
    dataset: str | None = field(default=None, metadata={"help": "Name of the data set, for the model card."})
    hub_strategy: str = field(default="end", metadata={"help": "Keep it at end: the complete model is pushed."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Keep it at False."})

    __repr__ = TrainingArguments.__str__  # hides the tokens, which that of a dataclass shows

    def __post_init__(self):
        check_choices(self)
        if self.router_aux_loss_coef != 0:
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, but no router loss is added; expected 0."
            )
        self._check_depth_arguments()
        refuse_unused_search(self)
        super().__post_init__()
        check_hub_strategy(self)

    def _check_depth_arguments(self):
        if self.step_cost != "auto":
            try:
                self.step_cost = float(self.step_cost)
            except ValueError:
                raise ValueError(f"step_cost is {self.step_cost!r}; expected a number or auto.") from None
        has_policy = self.depth_weight > 0
        checks = [
            (0 <= self.step_cost_warmup <= 1, f"step_cost_warmup is {self.step_cost_warmup}; expected 0 to 1."),
            (self.step_cost != "auto" or self.depth_gradient == "exact",
             'step_cost is "auto", which needs depth_gradient="exact", the rewards of all depths.'),
            (self.fixed_depth is None or not has_policy,
             f"fixed_depth is {self.fixed_depth}, so the depth policy cannot learn; set depth_weight to 0."),
            (not self.drop_groups_without_signal or self.loss_type in ("grpo", "dapo", "dr_grpo"),
             f"drop_groups_without_signal needs loss_type grpo, dapo or dr_grpo; it is {self.loss_type}."),
            (not self.drop_groups_without_signal or (self.entropy_coef == 0 and not self.use_adaptive_entropy),
             "drop_groups_without_signal would scale TRL's entropy bonus too; expected entropy_coef=0 and "
             "use_adaptive_entropy=False."),
        ]  # fmt: skip
        for is_met, message in checks:
            if not is_met:
                raise ValueError(message)

"""Reinforcement learning of recommendation quality and depth together, on TRL's GRPOTrainer."""

import inspect
import math
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import pad

from ..files import read_json, write_json
from ..model.base_lasar import sampled_depth
from ..model.catalog_lasar import SidCatalog
from ..model.configuration_lasar import LATENT_START_TOKEN
from ..model.decoding_lasar import history_filter, sample_items
from .catalog_head import add_catalog_head
from .depth_policy import score_depths
from .grpo_config import LasarGRPOConfig
from .lora import check_token_rows, complete_reference, is_adapter, load_model, train_policy_head
from .losses import DISTANCES, exact_depth_loss, reinforce_loss
from .prefix_sampler import PrefixRepeatSampler, prefix_groups
from .rewards import load_rewards
from .sharding import refuse_zero3, uses_zero3
from .trainer_mixin import LasarTrainerMixin, as_sets, check_lengths, latent_metrics, split_processor, unwrap_lasar


STATE_NAME = "lasar_state.json"
# Arguments of TRL that have to keep these values, and why.
DRAWN = (
    "candidates come from the latent loop, have no end token, and must be drawn from the distribution that is scored; "
    "only temperature can be changed"
)
SUPPORTED = {
    "mask_truncated_completions": (False, DRAWN), "use_vllm": (False, DRAWN),
    "use_transformers_continuous_batching": (False, DRAWN),
    "top_k": (0, DRAWN), "top_p": (1.0, DRAWN), "min_p": (None, DRAWN), "repetition_penalty": (1.0, DRAWN),
    "generation_kwargs": (None, DRAWN),
    "neftune_noise_alpha": (None, "candidates are drawn without noise and must be scored without it"),
    "cast_lm_head_to_fp32": (False, "log-probabilities are computed in float32 anyway"),
    "remove_unused_columns": (False, "rewards and the terminal loss read the columns target and terminal_anchor"),
    "sync_ref_model": (False, "checkpoints do not contain the reference, so a resumed run would differ"),
}  # fmt: skip
# Arguments of TRL's trainer that replace how candidates are drawn.
UNSUPPORTED = ("rollout_func", "tools", "environment_factory")
# Metrics of an evaluation; there are more for each reward.
METRICS = (
    "reward", "reward_std", "frac_reward_zero_std", "entropy", "mean_depth", "depth_entropy", "latent_norm_ratio",
    "latent_cosine", "reward_baseline",
)  # fmt: skip


class LasarGRPOTrainer(LasarTrainerMixin, GRPOTrainer):
    r"""
    Trainer for the RL stage of LASAR (arXiv 2605.10207).

    The only changes w.r.t. [`~trl.GRPOTrainer`] are how candidates are drawn and two more losses; everything else
    (advantages, clipping, KL penalty, logging) is inherited:

        L = L_GRPO + γ_KL · L_terminal + γ_RF · L_RF,      L_terminal = KL_bi(h_N, h_final^cot)

    For each prompt a depth `N ~ π(· | h_0)` is drawn and the latent loop runs once. The `G` candidates are drawn from
    the policy normalised over the catalogue, which also scores them, so the ratio is 1 on-policy. The latent slots are
    part of the prompt's token ids, so every forward of TRL runs at that depth. `alignment` may replace `KL_bi`; `L_RF`
    is [`~lasar_hf.trainers.reinforce_loss`], or [`~lasar_hf.trainers.exact_depth_loss`] (`depth_gradient`).

    Args:
        model (`str` or [`LasarForGenerativeRec`] or [`~peft.PeftModel`]):
            The stage-2 model, or its path. With `beta > 0` it is also the reference, for which an instance is saved to
            `output_dir/reference_model`.
        args, catalog, processing_class:
            As for [`LasarSFTTrainer`]; the catalogue is required.
        reward_funcs (`list[Callable]`, *optional*):
            Rewards, see [`~lasar_hf.trainers.load_rewards`]. Defaults to exact match and ranking.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt` (text that ends in `<|latent_start|>`), `target` (index in the catalogue, or item id) and,
            for the terminal loss, `terminal_anchor` (`H` floats), see [`~lasar_hf.data.grpo_examples`].
        ranking_evaluator (`Callable` or `dict[str, Callable]`, *optional*):
            As for [`LasarSFTTrainer`].
        kwargs:
            Passed to [`~trl.GRPOTrainer`].
    """

    # The path of the additional state through TRL's methods, in the order of a generation:
    #   draw_candidates                  returns `items` and `depth_log_prob`, which TRL adds to the examples
    #   _calculate_rewards               keeps the mean reward of each group in `self._group_rewards`, and whether its
    #                                    rewards differ in `self._has_signal`
    #   _generate_and_score_completions  writes both into the batch, which TRL shuffles and splits into micro-batches,
    #                                    and updates `self.reward_baseline`
    #   compute_loss                     reads them from its micro-batch, and the latent states from `self._outputs`

    _tag_names = ["trl", "grpo", "lasar"]
    _title, _description = "Reinforcement learning", "GRPO of items and depth with `LasarGRPOTrainer`."

    def __init__(
        self,
        model,
        args: LasarGRPOConfig,
        catalog: SidCatalog | None = None,
        reward_funcs=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        ranking_evaluator: Callable[[nn.Module], dict[str, float]] | dict[str, Callable] | None = None,
        **kwargs,
    ):
        revision = (args.model_init_kwargs or {}).get("revision")
        self.processor, tokenizer, self.catalog = split_processor(model, processing_class, catalog, revision)
        if self.catalog is None:
            raise ValueError("catalog is missing. Pass it, or a LasarProcessor as processing_class.")
        _check_arguments(args, kwargs, has_eval=eval_dataset is not None, num_items=self.catalog.num_items)
        train_dataset = _checked_examples(train_dataset, self.catalog)
        eval_dataset = _checked_examples(eval_dataset, self.catalog, "eval_dataset")
        eval_dataset = self.set_ranking_evaluator(ranking_evaluator, eval_dataset)
        model = load_model(model, **(args.model_init_kwargs or {})) if is_adapter(model) else model
        refuse_zero3(model, args, kwargs.get("peft_config"))
        is_name = isinstance(model, str)
        config = AutoConfig.from_pretrained(model, revision=revision) if is_name else unwrap_lasar(model).config
        self.catalog.check_matches(config.num_sid_levels, config.codebook_size)
        config.check_depth("fixed_depth", args.fixed_depth)
        args.max_completion_length = config.num_sid_levels
        if reward_funcs is None:
            reward_funcs = load_rewards(["exact_match", "ranking"], self.catalog, config, args.num_generations)
        # For an adapter the reference is the model without the adapter.
        if args.beta > 0 and kwargs.get("peft_config") is None and isinstance(model, PreTrainedModel):
            _save_reference(model, os.path.join(args.output_dir, "reference_model"))
        with warnings.catch_warnings():
            # TRL warns that `rollout_func` is experimental. Its version is pinned and a test covers the contract.
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model,
                reward_funcs,
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                rollout_func=self.draw_candidates,
                **kwargs,
            )
        if isinstance(self.model, PeftModel):
            complete_reference(self.model)
        lasar = unwrap_lasar(self.model)
        for dataset in [*as_sets(train_dataset), *as_sets(eval_dataset)]:
            check_lengths(dataset, config, tokenizer=self.processing_class)
        self.check_best_metric(eval_dataset)
        for policy in (lasar, self.ref_model):
            if policy is not None:
                add_catalog_head(self.accelerator.unwrap_model(policy), self.catalog, args.temperature)
                if args.disable_dropout:
                    disable_functional_dropout(policy)
        check_token_rows(lasar)
        train_policy_head(lasar, args.depth_weight > 0)
        lasar.model.detach_policy = args.depth_gradient == "exact"
        self.record_latent_states(lasar)
        self._group_rewards: torch.Tensor | None = None
        self._has_signal: torch.Tensor | None = None
        self.reward_baseline: float | None = None  # b_EMA; starts as the mean reward of the first batch
        # λ; the first batch sets an automatic one.
        self.step_cost: Any = None if args.step_cost == "auto" else args.step_cost

    def loss_terms(self) -> dict[str, float]:
        """Weight of each term of the loss by its name, for the model card."""
        args = self.args
        has_anchors = any("terminal_anchor" in (data.column_names or ()) for data in as_sets(self.train_dataset))
        terminal = args.terminal_weight if has_anchors and args.alignment != "none" else 0.0
        return {
            f"GRPO with the rewards {', '.join(self.reward_func_names)}": 1.0,
            "KL to the starting checkpoint": args.beta,
            f"terminal alignment ({args.alignment})": terminal,
            f"depth policy ({args.depth_gradient})": args.depth_weight,
        }

    def draw_candidates(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        """
        Candidates in TRL's `rollout_func` protocol: per prompt one depth, one latent loop and `G` items.

        `prompts` has each prompt `G` times in a row. Returns lists of length `B · G`: `prompt_ids` with the latent
        slots, `completion_ids` (`M` SID tokens, each group in descending order of probability), `items` (indices in
        the catalogue), `depth_log_prob` (`log π(N | h_0)`); `logprobs` is `None`, as drawing and training use the
        same weights.
        """
        group_size = self.num_generations  # of training and of evaluation
        # 1. Each prompt once, left-padded.
        ids = self.processing_class(prompts[::group_size], add_special_tokens=False).input_ids  # B lists
        prompt_ids = pad([torch.tensor(prompt) for prompt in ids], padding_side="left")  # (B, L)
        mask = pad([torch.ones(len(prompt), dtype=torch.long) for prompt in ids], padding_side="left")  # (B, L)
        prompt_ids, mask = prompt_ids.to(self.accelerator.device), mask.to(self.accelerator.device)

        # 2. Depths and their log-probabilities (B,), items (B, G), on gathered weights.
        draw = partial(self._draw, prompt_ids=prompt_ids, prompt_mask=mask)
        depths, log_probs, items = self.on_gathered_weights(draw)

        # 3. Tokens: prompt, latent slots and <|latent_end|>, then the SID tokens of each item.
        config = unwrap_lasar(self.model).config
        slots = [[config.latent_token_id] * depth + [config.latent_end_token_id] for depth in depths.tolist()]
        first_ids = config.sid_token_id(0, 0) + config.codebook_size * torch.arange(config.num_sid_levels)  # (M,)
        completion_ids = (self.catalog.codes[items.cpu()] + first_ids).flatten(0, 1)  # (B · G, M)
        return {
            "prompt_ids": [p + slot for p, slot in zip(ids, slots, strict=True) for _ in range(group_size)],
            "completion_ids": completion_ids.tolist(),
            "logprobs": None,
            "items": items.flatten().tolist(),
            "depth_log_prob": log_probs.repeat_interleave(group_size).tolist(),
        }

    def _draw(self, lasar, prompt_ids, prompt_mask) -> tuple[torch.Tensor, ...]:
        """A depth `(B,)` with its log-probability `(B,)` and `G` items `(B, G)` for each prompt."""
        trie = self.catalog.trie(prompt_ids.device)
        options = {"replacement": self.args.sampling == "sample"}
        min_steps, depths = lasar.config.min_latent_steps, self.args.fixed_depth
        if depths is None:
            depths = partial(sampled_depth, min_latent_steps=min_steps)
        with lasar.evaluation_mode():
            state, trees = lasar.encode_prompt_trees(prompt_ids, prompt_mask, depths)
            history = history_filter(lasar.config, trie, prompt_ids[trees.member])
            leaves, scores = sample_items(
                lasar, state, trie, self.num_generations, self.temperature, history=history, **options
            )  # (U, G)
        if (scores == -torch.inf).any():
            raise ValueError(
                f"num_generations is {self.num_generations}, but a prompt has fewer items to draw that are not in its "
                'history. Lower it, or set sampling="sample".'
            )
        depths, leaves = state.depths[trees.path], leaves[trees.path]  # (B,), (B, G)
        log_policy = state.depth_logits[trees.path].float().log_softmax(dim=-1)  # (B, C)
        # A fixed depth that is no class of the policy has no probability, and none is needed.
        log_probs = log_policy.gather(1, (depths[:, None] - min_steps).clamp(min=0))[:, 0]  # (B,)
        # Items that share a Semantic ID are one candidate, represented by the first of them.
        return depths, log_probs, trie.items(leaves)[..., 0]

    def check_best_metric(self, eval_dataset) -> None:
        """Refuse a `metric_for_best_model` that no evaluation returns; a reward with `log_metric` may return any."""
        metric = self.args.metric_for_best_model
        functions = [function for function in self.reward_funcs if not isinstance(function, nn.Module)]
        may_log = any("log_metric" in inspect.signature(function).parameters for function in functions)
        if metric is None or may_log or self.ranking_names() is None:
            return
        names = [f"{name}_loss" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["loss"]
        names += [*METRICS, "kl"] if self.args.beta > 0 else METRICS
        names += ["depth_loss", "step_cost"] if self.args.depth_weight > 0 else []
        has_anchors = any("terminal_anchor" in dataset.column_names for dataset in as_sets(eval_dataset))
        names += ["terminal_loss"] if self.args.alignment != "none" and has_anchors else []
        names += [f"rewards/{name}/{part}" for name in self.reward_func_names for part in ("mean", "std")]
        names = [*(names if eval_dataset else ()), *self.ranking_names()]
        if metric.removeprefix("eval_") not in names:
            raise ValueError(
                f"metric_for_best_model is {metric!r}; expected an eval_dataset or a ranking_evaluator, and one of "
                f"{', '.join(names)}."
            )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """TRL's evaluation, of examples that are checked as at the start."""
        return super().evaluate(
            _checked_examples(eval_dataset, self.catalog, "eval_dataset"), ignore_keys, metric_key_prefix
        )

    def create_optimizer(self, *args, **kwargs):
        """TRL's optimizer, with the learning rate of the policy head."""
        is_new, optimizer = self.optimizer is None, super().create_optimizer(*args, **kwargs)
        if is_new and self.args.policy_learning_rate is not None:
            head = {id(weight) for weight in unwrap_lasar(self.model).model.policy_head.parameters()}
            for group in list(optimizer.param_groups):
                own = [weight for weight in group["params"] if id(weight) in head]
                if own:
                    group["params"] = [weight for weight in group["params"] if id(weight) not in head]
                    optimizer.add_param_group(group | {"params": own, "lr": self.args.policy_learning_rate})
        return optimizer

    def _get_train_sampler(self, dataset=None):
        """TRL's order of prompts, as a function of the epoch, with `prompts_per_user` prompts of a user together."""
        base = super()._get_train_sampler(dataset)
        groups = [[index] for index in range(base.num_samples)]
        if self.args.prompts_per_user > 1:
            prompts = base.data_source.with_format(None)["prompt"]
            groups = prefix_groups([prompt.removesuffix(LATENT_START_TOKEN) for prompt in prompts])
        return PrefixRepeatSampler(base, groups, self.args.prompts_per_user)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Keep the mean reward of each group, from which the depth policy learns, and whether its rewards differ."""
        # A sequence is a candidate here; P counts those of all processes.
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (P, functions)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)  # (P,)
        # As in TRL, a candidate without any reward does not count. A group of them gets the mean of the others.
        weighted = weighted.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        group_means = weighted.view(-1, self.num_generations).nanmean(dim=1)  # (P / G,)
        group_means = group_means.where(~group_means.isnan(), weighted.nanmean()).nan_to_num()
        self._group_rewards = group_means.repeat_interleave(self.num_generations)  # (P,)
        # Rewards are compared rather than advantages, which rounding may keep from 0 in a group of equal rewards.
        by_group = rewards.nan_to_num(0).unflatten(0, (-1, self.num_generations))  # (P / G, G, functions)
        differs = (by_group != by_group[:, :1]).flatten(1).any(dim=1)  # (P / G,)
        self._has_signal = differs.repeat_interleave(self.num_generations)  # (P,)
        return rewards

    def _generate_and_score_completions(self, inputs):
        """Add what the extra losses need to the batch, so that TRL shuffles and splits it with the candidates."""
        output = super()._generate_and_score_completions(inputs)
        rewards = self._group_rewards  # (P,)
        if self.args.depth_reward == "rank":
            rewards = self.accelerator.gather(rewards.new_tensor(self._rank_rewards(inputs)))
        start = self.accelerator.process_index * len(inputs)
        output["group_reward"] = rewards[start : start + len(inputs)]  # (B · G,), those of this process
        mean = rewards.mean().item()
        baseline = mean if self.reward_baseline is None else self.reward_baseline
        output["reward_baseline"] = torch.full_like(output["group_reward"], baseline)  # (B · G,)
        if self.args.depth_gradient == "exact" and self.args.depth_weight > 0:
            output["depth_rewards"] = self._depth_rewards(inputs)  # (B · G, C)
        if self.args.drop_groups_without_signal:
            self._drop_groups(output, self._has_signal[start : start + len(inputs)])
        # TRL wrote what the rollout returned into the examples.
        output["depth_log_prob"] = rewards.new_tensor([example["depth_log_prob"] for example in inputs])  # (B · G,)
        if self.args.alignment != "none":  # prompts without an anchor get zeros, and no terminal loss
            anchors = [example.get("terminal_anchor") for example in inputs]
            zeros = [0.0] * unwrap_lasar(self.model).config.hidden_size
            has_term = rewards.new_tensor([anchor is not None for anchor in anchors])  # (B · G,)
            slots = output["prompt_ids"] == unwrap_lasar(self.model).config.latent_token_id  # (B · G, L)
            has_term = has_term * slots.any(dim=1)  # h_0 is no latent step
            share = self.accelerator.gather(has_term).mean()
            # For a mean over the sequences with this loss, in whatever micro-batches they are.
            output["terminal_scale"] = has_term / share.clamp(min=1 / len(rewards))  # (B · G,)
            anchors = torch.tensor([zeros if anchor is None else anchor for anchor in anchors])
            output["terminal_anchor"] = anchors.to(rewards.device)  # (B · G, H)
        if self.model.training:
            decay = self.args.baseline_decay
            self.reward_baseline = decay * baseline + (1 - decay) * mean
        return output

    def _rank_rewards(self, inputs) -> list[float]:
        """`1 / log2(r + 1)` for each candidate, with the rank of the target in its group; 0 without the target."""
        rewards, size = [], self.num_generations
        for start in range(0, len(inputs), size):
            group = inputs[start : start + size]
            distinct = list(dict.fromkeys(example["items"] for example in group))  # by descending probability
            codes = self.catalog.codes[distinct]  # (D, M)
            is_target = (codes == self.catalog.codes[group[0]["target"]]).all(dim=1)  # (D,)
            found = is_target.nonzero()[:, 0].tolist()
            rewards += [1 / math.log2(found[0] + 2) if found else 0.0] * size
        return rewards

    def _depth_rewards(self, inputs) -> torch.Tensor:
        """`log p(target | N)` of each candidate's prompt, `(B · G, C)`. The first ones set an automatic step cost."""
        prompts = inputs[:: self.num_generations]
        ids = self.processing_class([row["prompt"] for row in prompts], add_special_tokens=False).input_ids
        config = unwrap_lasar(self.model).config
        depths = range(config.min_latent_steps, config.max_latent_steps + 1)
        score = partial(
            score_depths,
            catalog=self.catalog,
            prompts=ids,
            targets=[row["target"] for row in prompts],
            depths=depths,
            temperature=self.args.temperature,
            batch_size=max(self.args.per_device_train_batch_size // len(depths), 1),
        )
        rewards = self.on_gathered_weights(score).log_probs  # (B, C)
        if self.step_cost is None:
            gains = self.accelerator.gather(rewards.max(dim=1).values - rewards[:, 0])
            self.step_cost = 0.5 * gains.mean().item() / max(rewards.shape[1] - 1, 1)
        return rewards.repeat_interleave(self.num_generations, dim=0)

    def _drop_groups(self, output: dict, differs: torch.Tensor) -> None:
        """Leave groups whose rewards do not differ, or cancel, out of TRL's loss: a mean over the other groups."""
        groups = output["advantages"].view(-1, self.num_generations)  # (B, G)
        has_signal = differs & (groups != 0).any(dim=1).repeat_interleave(self.num_generations)  # (B · G,)
        output["completion_mask"] = output["completion_mask"] * has_signal[:, None]
        share = self.accelerator.gather(has_signal.float()).mean()
        output["loss_scale"] = torch.where(share > 0, 1 / share, 0.0).expand(len(has_signal))  # (B · G,)

    def _present_step_cost(self) -> float:
        """`λ`, which rises linearly from 0 during the warm-up."""
        warmup = self.args.step_cost_warmup * self.state.max_steps
        return self.step_cost * min(1.0, self.state.global_step / warmup) if warmup > 0 else self.step_cost

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`L_GRPO` of TRL, plus the terms that read the latent states of the same pass."""
        # 1. The clipped policy gradient and the KL penalty; this runs the model.
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.drop_groups_without_signal:
            loss = loss * inputs["loss_scale"][0]
        output = self._outputs.pop()
        metrics = latent_metrics(output, unwrap_lasar(self.model).get_input_embeddings())
        extra = torch.zeros_like(loss)

        # 2. Terminal loss: the last latent state against the last anchor. Depths differ, so no other step has one.
        if self.args.alignment != "none":
            steps = output.latent_steps
            last = output.latent_states[torch.arange(len(steps), device=steps.device), steps]  # (B, H)
            distances = DISTANCES[self.args.alignment](last, inputs["terminal_anchor"])  # (B,)
            scale = inputs["terminal_scale"]  # (B,)
            metrics["terminal_loss"] = (distances * (scale > 0)).sum(), (scale > 0).sum()
            extra = extra + self.args.terminal_weight * (distances * scale).mean()

        # 3. The depth policy.
        if self.args.depth_weight > 0:
            step_cost, first = self._present_step_cost(), unwrap_lasar(self.model).config.min_latent_steps
            if self.args.depth_gradient == "exact":
                depth = exact_depth_loss(
                    output.depth_logits, inputs["depth_rewards"], step_cost, self.args.depth_entropy_weight, first
                )
            else:
                depth = reinforce_loss(
                    output.depth_logits,
                    output.latent_steps,
                    inputs["group_reward"],
                    inputs["reward_baseline"],
                    step_cost,
                    self.args.depth_entropy_weight,
                    inputs["depth_log_prob"],
                    first,
                )
            metrics["depth_loss"] = depth * len(output.depth_logits), len(output.depth_logits)
            metrics["step_cost"] = step_cost, 1
            extra = extra + self.args.depth_weight * depth

        # 4. Like TRL's own loss: the Trainer does not divide by the number of accumulated micro-batches afterwards.
        metrics["reward_baseline"] = inputs["reward_baseline"].sum(), len(inputs["reward_baseline"])
        self.log_means(metrics)
        return loss + extra / (self.current_gradient_accumulation_steps if self.model.training else 1)

    def _save_checkpoint(self, model, trial):
        """Save the baseline and the position in a generation, before TRL's last file completes the checkpoint."""
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            micro_batch = self._step % (self.args.steps_per_generation * self.num_iterations)
            state = {
                "reward_baseline": self.reward_baseline, "step_cost": self.step_cost, "micro_batch": micro_batch
            }  # fmt: skip
            write_json(os.path.join(folder, STATE_NAME), state)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = read_json(os.path.join(checkpoint, STATE_NAME))
            if state["micro_batch"] > 0:
                raise ValueError(
                    f"{checkpoint} was saved during a generation (micro_batch {state['micro_batch']}), whose "
                    "candidates are lost. Resume from an earlier checkpoint."
                )
            self.reward_baseline = state["reward_baseline"]
            if self.args.step_cost == "auto":
                self.step_cost = state["step_cost"]


def _save_reference(model: PreTrainedModel, folder: str) -> None:
    """Save the start of the run where TRL loads the reference from, `config._name_or_path`."""
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(folder)
    state.wait_for_everyone()
    model.config._name_or_path = folder


def _checked_examples(dataset: object, catalog: SidCatalog, where: str = "train_dataset") -> object:
    """The examples, with item indices instead of item ids as `target`; a stream of them is not read."""
    if isinstance(dataset, dict):
        return {name: _checked_examples(part, catalog, f"{where}[{name!r}]") for name, part in dataset.items()}
    if not isinstance(dataset, Dataset):
        return dataset
    columns = set(dataset.column_names)
    if not {"prompt", "target"} <= columns or not all(isinstance(text, str) for text in dataset["prompt"]):
        raise ValueError(f"{where} has {columns}; expected prompt with text (not messages) and target.")
    other = [text for text in dataset["prompt"] if not text.endswith(LATENT_START_TOKEN)]
    if other:
        raise ValueError(f"prompt of {where} ends in {other[0][-20:]!r}; expected {LATENT_START_TOKEN} at its end.")
    targets = list(dataset["target"])
    indices = [catalog.index_of.get(item) if isinstance(item, str) else item for item in targets]
    pairs = list(zip(targets, indices, strict=True))
    wrong = [item for item, index in pairs if type(index) is not int or index not in range(len(catalog))]
    if wrong:
        raise ValueError(
            f"target of {where} is {wrong[0]!r}; expected an item id of the catalogue or an index < {len(catalog)}."
        )
    return dataset.remove_columns("target").add_column("target", indices)


def _check_arguments(args: LasarGRPOConfig, kwargs: dict, has_eval: bool, num_items: int) -> None:
    """Refuse arguments under which candidates could not be drawn, scored or resumed."""
    for name, (supported, reason) in SUPPORTED.items():
        if getattr(args, name) != supported:
            raise ValueError(f"{name} is {getattr(args, name)}; expected {supported}, since {reason}.")
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported: candidates come from the latent loop. Leave it out.")
    if args.sampling == "stochastic_beams":
        warnings.warn(
            'sampling is "stochastic_beams", whose candidates are distinct but not weighted: the gradient is biased. '
            'Use "sample" to follow the gradient of the expected reward.',
            stacklevel=3,
        )
    group_size = args.num_generations
    local = args.per_device_train_batch_size * args.steps_per_generation
    # Candidates are not saved, so a run resumes exactly only between two generations.
    generate_every = args.steps_per_generation * args.num_iterations
    boundary = generate_every // math.gcd(generate_every, args.gradient_accumulation_steps)
    is_boundary = args.save_steps >= 1 and int(args.save_steps) % boundary == 0
    whole_groups = f"must be divisible by num_generations ({group_size}): one process draws whole groups."
    checks = [
        (args.prompts_per_user >= 1, f"prompts_per_user is {args.prompts_per_user}; expected at least 1."),
        (args.temperature > 0, f"temperature is {args.temperature}; expected a positive number."),
        (not uses_zero3(args) or args.ds3_gather_for_generation,
         "ds3_gather_for_generation must be True under ZeRO-3: drawing reads rows of the head."),
        (local % group_size == 0, f"per_device_train_batch_size × steps_per_generation ({local}) {whole_groups}"),
        (not has_eval or args.per_device_eval_batch_size % group_size == 0,
         f"per_device_eval_batch_size ({args.per_device_eval_batch_size}) {whole_groups}"),
        (args.num_generations_eval in (None, group_size),
         f"num_generations_eval is {args.num_generations_eval}; expected num_generations ({group_size}), the group "
         "size of the ranking reward. Leave it out."),
        (args.sampling == "sample" or group_size <= num_items,
         f"num_generations is {group_size}, but there are {num_items} items to draw without replacement. Lower it, "
         'or set sampling="sample".'),
        (args.save_strategy != "steps" or is_boundary,
         f"save_steps is {args.save_steps}; expected a multiple of {boundary} steps, at which no drawn candidates are "
         "left to learn from. A run resumes exactly only there."),
    ]  # fmt: skip
    for is_met, message in checks:
        if not is_met:
            raise ValueError(message)


def disable_functional_dropout(model: nn.Module) -> None:
    """Set dropout rates that layers pass to functions (attention's) to 0. TRL disables dropout modules only."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)

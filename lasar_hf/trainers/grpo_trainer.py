"""Reinforcement learning of quality and depth together, on TRL's GRPOTrainer."""

import json
import math
import os
import warnings
from functools import partial

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler, pad

from ..model.base_lasar import sampled_depth
from ..model.catalog_lasar import SidCatalog
from ..model.decoding_lasar import sample_items
from .catalog_head import add_catalog_head
from .grpo_config import LasarGRPOConfig
from .latent_states import LatentStateRecorder, last_latent, latent_metrics, unwrap_lasar
from .lora import complete_reference, refuse_zero3, train_policy_head
from .losses import bidirectional_kl, reinforce_loss
from .model_card import save_model_card
from .rewards import ExactMatchReward, RankingReward
from .sharding import run_with_gathered_weights


STATE_NAME = "lasar_state.json"


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, ordered by the epoch alone: a run that resumes in a later epoch sees the same prompts."""

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class LasarGRPOTrainer(GRPOTrainer):
    r"""
    GRPO for LASAR. It differs from [`~trl.GRPOTrainer`] in how candidates are drawn and in two more losses; the rest
    is inherited:

        L = L_GRPO + γ_KL · L_terminal + γ_RF · L_RF        (METHOD.md 5)

    For each prompt a depth `N ~ π(· | h_0)` is drawn and the latent loop runs once; the `G` candidates are drawn from
    the catalogue-normalised policy, which is the one that is scored, so the ratio is 1 on-policy. The latent slots are
    part of the prompt's token ids, hence every pass of TRL sees the depth. `L_terminal = KL_bi(h_N, h_final^cot)` and
    REINFORCE on the depth policy read the pass that made `L_GRPO`.

    Args:
        model (`str` or [`LasarForGenerativeRec`] or [`~peft.PeftModel`]):
            The stage-2 model, or its path. With `beta > 0` it is also the reference; an instance is written to
            `output_dir/reference_model` for that.
        args ([`LasarGRPOConfig`]):
            Arguments.
        catalog ([`SidCatalog`]):
            The items.
        reward_funcs (`list`, *optional*):
            Reward functions; exact match and ranking if not given. They read `completion_ids`, since special tokens
            vanish from decoded text.
        train_dataset ([`~datasets.Dataset`]):
            Columns `prompt` (text that ends in `<|latent_start|>`), `target` (row in the catalogue) and, for the
            terminal anchor loss, `terminal_anchor` (`H` floats), see [`~lasar_hf.data.grpo_examples`].
        kwargs:
            Passed to [`~trl.GRPOTrainer`].

    Raises:
        `ValueError`: if groups would be split over processes, `save_steps` is not a generation boundary, or an option
        that cannot work with fixed-length answers is set (`mask_truncated_completions`, `use_vllm`).
    """

    _tag_names = ["trl", "grpo", "lasar"]
    _name = "LASAR GRPO"

    def __init__(
        self,
        model,
        args: LasarGRPOConfig,
        catalog: SidCatalog,
        reward_funcs=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        _check_arguments(args)
        if eval_dataset is not None and args.per_device_eval_batch_size % args.num_generations:
            raise ValueError(
                f"per_device_eval_batch_size={args.per_device_eval_batch_size} is no multiple of num_generations="
                f"{args.num_generations}: a group must not be split over processes."
            )
        refuse_zero3(model, args, kwargs.get("peft_config"))
        lasar_config = unwrap_lasar(model).config if not isinstance(model, str) else AutoConfig.from_pretrained(model)
        args.max_completion_length = lasar_config.num_sid_levels
        if args.sampling == "stochastic_beams" and args.num_generations > catalog.num_items:
            raise ValueError(
                f"num_generations={args.num_generations} candidates without replacement from {catalog.num_items} "
                'items: lower it, or set sampling="sample".'
            )
        catalog.check_matches(lasar_config.num_sid_levels, lasar_config.codebook_size)
        if reward_funcs is None:
            reward_funcs = [
                ExactMatchReward(catalog, lasar_config), RankingReward(catalog, lasar_config, args.num_generations)
            ]
        # The reference of an adapter is the model without it.
        is_reloaded = args.beta > 0 and kwargs.get("peft_config") is None
        if is_reloaded and isinstance(model, PreTrainedModel):
            _snapshot_reference(model, os.path.join(args.output_dir, "reference_model"))
        with warnings.catch_warnings():
            # TRL warns that `rollout_func` is experimental; its version is pinned and its contract tested.
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                rollout_func=self._draw_candidates,
                **kwargs,
            )
        self.catalog = catalog
        if isinstance(self.model, PeftModel):
            complete_reference(self.model)
        lasar = unwrap_lasar(self.model)
        for policy in (lasar, self.ref_model):
            if policy is not None:
                add_catalog_head(self.accelerator.unwrap_model(policy), catalog, args.temperature)
                if args.disable_dropout:
                    disable_functional_dropout(policy)
        train_policy_head(lasar, args.depth_weight > 0)
        self._recorder = LatentStateRecorder(lasar.model)
        self._group_rewards: torch.Tensor | None = None
        self.reward_baseline: float | None = None  # b_EMA, the first batch's mean reward to begin with

    def _draw_candidates(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        """
        Rollouts in TRL's `rollout_func` protocol: one depth and one latent chain a prompt, `G` items from the policy.

        Args:
            prompts (`list[str]`):
                Prompts, each `G` times in a row.
            trainer ([`~trl.GRPOTrainer`]):
                This trainer.

        Returns:
            `dict` with `prompt_ids` (the latent slots included), `completion_ids` (`M` SID tokens, a group's
            candidates in descending order of probability), `logprobs` (`None`: there is no second engine to correct
            for) and `depth_log_prob` (`log π(N | h_0)` of the depth drawn).
        """
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        ids = self.processing_class(prompts[::group_size], add_special_tokens=False).input_ids
        padded = pad([torch.tensor(row) for row in ids], padding_side="left").to(self.accelerator.device)
        mask = pad([torch.ones(len(row), dtype=torch.long) for row in ids], padding_side="left").to(padded.device)
        with (
            unwrap_model_for_generation(
                self.model_wrapped, self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            ) as unwrapped,
            unwrap_lasar(unwrapped).evaluation_mode() as lasar,
        ):
            draw = partial(self._draw, lasar, padded, mask, group_size)
            depths, log_probs, items = run_with_gathered_weights(unwrapped, draw)
        config = lasar.config
        levels = config.sid_token_id(0, 0) + config.codebook_size * torch.arange(config.num_sid_levels)
        completions = (self.catalog.codes[items.cpu()] + levels).flatten(0, 1).tolist()
        slots = [[config.latent_token_id] * depth + [config.latent_end_token_id] for depth in depths.tolist()]
        prompt_ids = [row + slot for row, slot in zip(ids, slots, strict=True) for _ in range(group_size)]
        return {
            "prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None,
            "depth_log_prob": log_probs.repeat_interleave(group_size).tolist(),
        }

    def _draw(self, lasar, prompt_ids, prompt_mask, group_size: int) -> tuple[torch.Tensor, ...]:
        """A depth `(B,)` with its log-probability `(B,)` and `G` items `(B, G)` for each prompt."""
        trie = self.catalog.trie(prompt_ids.device)
        chain = lasar.encode_prompts(prompt_ids, prompt_mask, sampled_depth)
        leaves, _ = sample_items(
            lasar, chain, trie, group_size, self.temperature, replacement=self.args.sampling == "sample"
        )
        log_probs = chain.depth_logits.float().log_softmax(dim=-1).gather(1, chain.depths[:, None] - 1)[:, 0]
        return chain.depths, log_probs, trie.items(leaves)[..., 0]

    def _get_train_sampler(self, dataset=None):
        """TRL's order of prompts, made a function of the epoch."""
        sampler = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(
            sampler.data_source, sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count, sampler.shuffle,
            sampler.seed,
        )

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Keep the rewards, of all processes: the depth policy learns from a group's mean."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._group_rewards = weighted.view(-1, group_size).mean(dim=1).repeat_interleave(group_size)
        return rewards

    def _generate_and_score_completions(self, inputs):
        """Send what the extra losses need along with the candidates, through TRL's shuffling and splitting."""
        output = super()._generate_and_score_completions(inputs)
        rewards, mean = self._group_rewards, self._group_rewards.mean().item()
        baseline = mean if self.reward_baseline is None else self.reward_baseline
        start = self.accelerator.process_index * len(inputs)
        output["group_reward"] = rewards[start : start + len(inputs)]
        output["reward_baseline"] = torch.full_like(output["group_reward"], baseline)
        # TRL handed what the rollout returned on to the examples.
        output["depth_log_prob"] = rewards.new_tensor([example["depth_log_prob"] for example in inputs])
        if "terminal_anchor" in inputs[0]:
            anchors = torch.tensor([example["terminal_anchor"] for example in inputs])
            output["terminal_anchor"] = anchors.to(rewards.device)
        if self.model.training:
            decay = self.args.baseline_decay
            self.reward_baseline = decay * baseline + (1 - decay) * mean
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`L_GRPO` of TRL, then the terms that read the latent states of the same pass."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output = self._recorder.pop()
        metrics = latent_metrics(output, unwrap_lasar(self.model).get_input_embeddings())
        extra = torch.zeros_like(loss)
        if "terminal_anchor" in inputs:
            terminal = bidirectional_kl(last_latent(output), inputs["terminal_anchor"]).mean()
            metrics["terminal_loss"] = terminal
            extra = extra + self.args.terminal_weight * terminal
        if self.args.depth_weight > 0:
            depth = reinforce_loss(
                output.depth_logits, output.latent_steps, inputs["group_reward"], inputs["reward_baseline"],
                self.args.step_cost, self.args.depth_entropy_weight, inputs["depth_log_prob"],
            )
            metrics["depth_loss"] = depth
            extra = extra + self.args.depth_weight * depth
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            value = self.accelerator.gather(value.detach().float()).mean().item()
            self._metrics[mode][name].append(value)
        self._metrics[mode]["reward_baseline"].append(inputs["reward_baseline"].mean().item())
        # As TRL does with its own loss, which is not scaled for gradient accumulation afterwards.
        return loss + extra / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    def _save_checkpoint(self, model, trial):
        """The running mean of the rewards belongs to the state of the run, and so does its place in a generation."""
        if self.args.should_save:  # before all else: a checkpoint is whole when TRL's last file is there
            folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, STATE_NAME)
            micro_batch = self._step % (self.args.steps_per_generation * self.num_iterations)
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                json.dump({"reward_baseline": self.reward_baseline, "micro_batch": micro_batch}, file)
            os.replace(path + ".tmp", path)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            with open(os.path.join(checkpoint, STATE_NAME), encoding="utf-8") as file:
                state = json.load(file)
            if state["micro_batch"] > 0:
                raise ValueError(
                    f"{checkpoint} was written {state['micro_batch']} micro-batches behind a generation, whose "
                    "candidates are gone: resume from a checkpoint between generations."
                )
            self.reward_baseline = state["reward_baseline"]

    def _save(self, output_dir=None, state_dict=None):
        """The catalogue belongs beside the weights: a checkpoint alone can recommend."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.catalog.save_pretrained(output_dir or self.args.output_dir)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Write the card from this package: TRL's template is found inside the trl package only."""
        tags = [*self._tag_names, *(tags or [])]
        save_model_card(self, model_name, tags, "Reinforcement learning of LASAR with GRPO.")


def _check_arguments(args: LasarGRPOConfig) -> None:
    if args.mask_truncated_completions:
        raise ValueError("Semantic IDs have no end token: mask_truncated_completions=True would mask every answer.")
    is_zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
    if is_zero3 and not args.ds3_gather_for_generation:
        raise ValueError("Candidates are scored by rows of the head: under ZeRO-3 set ds3_gather_for_generation=True.")
    if args.use_vllm or args.use_transformers_continuous_batching:
        raise ValueError("Candidates come from the latent loop: set use_vllm and continuous batching to False.")
    _check_sampling(args)
    local = args.per_device_train_batch_size * args.steps_per_generation
    if local % args.num_generations:
        raise ValueError(
            f"A process draws {local} candidates at once (per_device_train_batch_size x steps_per_generation), which "
            f"is no multiple of num_generations={args.num_generations}: a group must not be split over processes."
        )
    if args.num_generations_eval not in (None, args.num_generations):
        raise ValueError(
            f"num_generations_eval={args.num_generations_eval} differs from num_generations={args.num_generations}, "
            "which the ranking reward counts by: leave it out."
        )
    if args.save_strategy == "steps":
        _check_save_steps(args)


def _check_sampling(args: LasarGRPOConfig) -> None:
    """Candidates come from the policy that is scored: only its temperature can be set."""
    unused = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None}
    for name, default in unused.items():
        if getattr(args, name) != default:
            raise ValueError(
                f"{name}={getattr(args, name)} would draw from another policy than the one that is scored: leave it "
                f"at {default}, only the temperature can be set."
            )


def _check_save_steps(args: LasarGRPOConfig) -> None:
    generate_every = args.steps_per_generation * args.num_iterations
    boundary = generate_every // math.gcd(generate_every, args.gradient_accumulation_steps)
    if args.save_steps < 1:
        raise ValueError(
            f"save_steps={args.save_steps} is a share of the run, which may fall between two generations, where no "
            f"run resumes exactly: give a number of steps, a multiple of {boundary}."
        )
    if int(args.save_steps) % boundary:
        raise ValueError(
            f"save_steps={int(args.save_steps)} falls between two generations (every {generate_every} "
            f"micro-batches), where no run resumes exactly: choose a multiple of {boundary}."
        )


def disable_functional_dropout(model: nn.Module) -> None:
    """
    Switch off the dropout that layers apply by a rate of their own, attention's mostly; TRL switches off modules only.

    Args:
        model (`nn.Module`):
            The policy or its reference.
    """
    for part in model.modules():
        for name, value in vars(part).items():
            if "dropout" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def _snapshot_reference(model: PreTrainedModel, folder: str) -> None:
    """TRL reloads the reference model from `config._name_or_path`: write down the model that training starts from."""
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(folder)
    state.wait_for_everyone()
    model.config._name_or_path = folder

"""Sampling responses: with transformers on a CPU, with vLLM on a GPU.

Both have three methods. generate(prompts, max_tokens, temperature, seed, numbers, logprobs) takes token ids
and returns, for each prompt, the token ids of one response and, if asked, their log-probs; max_tokens is a
number, or one for each prompt. update(weights) hands the trainer's over; differing(weights) names those that
did not arrive.

A row's noise depends on the seed and on its number in the batch of all processes, and on nothing else: so the
samples do not depend on how many processes there are.
"""
import inspect
import os
import sys
from collections.abc import Iterable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from runtime import processes
from runtime.flags import Args, explain, fail, out_of_memory
from runtime.policy import SMALL, Policy
from runtime.progress import bar, waiting
from runtime.rows import Problem, Row, collate

Sampled = list[tuple[list[int], list[float] | None]]  # token ids and, if asked for, log-probs of responses
STALE = {"cpu": 1e-3, "cuda": 0.1}  # mean nats a token from the trainer: float32, bfloat16
UNFUSED = ("mlp.down_proj.weight", "norm.weight")  # how weights are called that vLLM merges with no others


def differing(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> list[str]:
    """Names of those weights that the model has otherwise, to the bit, after a cast to its own dtype.

    Only what it keeps under the same name and in the same shape is compared: not what a kernel has packed.
    """
    own = dict(model.named_parameters())
    return [name for name, weight in weights.items() if name in own and own[name].shape == weight.shape
            and not torch.equal(own[name], weight.to(own[name].dtype))]


def limits(max_tokens: int | list[int], rows: int) -> list[int]:
    """One number for each row."""
    return [max_tokens] * rows if isinstance(max_tokens, int) else max_tokens


def row_seeds(seed: int, numbers: Iterable[int]) -> list[int]:
    """A seed for each row, by its number in the batch of all processes."""
    return [(seed * 1_000_003 + number) % 2**63 for number in numbers]


def row_noise(seeds: list[int], tokens: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), (rows, tokens), of each row's own generator."""
    return torch.stack([torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                        for seed in seeds])


def sample(logp: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """One token (rows, 1) from each row of log-probs (rows, V), by its cumulative distribution.

    That takes one number of noise (rows,) a row, where `multinomial` draws one for each word of it. At
    temperature 0 the likeliest token.
    """
    if temperature == 0:
        return logp.argmax(dim=-1, keepdim=True)
    cdf = logp.exp().cumsum(dim=-1, dtype=torch.float64)  # a float32 near 1 knows nothing below 6e-8
    token = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)  # never one of probability 0
    return token.clamp(max=logp.shape[1] - 1)  # noise below 1 may round to 1


class Recorder(transformers.LogitsProcessor):
    """Samples in `generate`'s place, which takes the token of the largest score, and keeps its log-prob."""

    def __init__(self, temperature: float, noise: torch.Tensor):
        self.temperature, self.noise, self.sampled = temperature, noise, []

    def __call__(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logp = (logits / (self.temperature or 1)).log_softmax(dim=-1)  # (rows, V)
        token = sample(logp, self.noise[:, len(self.sampled)], self.temperature)
        self.sampled.append(logp.gather(1, token))
        return torch.full_like(logits, -torch.inf).scatter(1, token, 0.0)


class TransformersSampler:
    """Rollout with transformers, on the trainer's own model or, where that is sharded, on a plain copy.

    A prompt is read once for all its responses, and a response that has ended leaves the batch: both are a
    choice of rows in the model's cache. A model with another kind of cache samples by `model.generate`.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int] | None = None,
    ):
        """ends: ids that end a response; None: the tokenizer's EOS."""
        self.model, self.pad, self.eos = model, tokenizer.pad_token_id, ends or [tokenizer.eos_token_id]
        self.accepted = inspect.signature(model.forward).parameters
        model.generation_config = transformers.GenerationConfig(  # no top_k, min_p or penalty of its own
            eos_token_id=self.eos, pad_token_id=self.pad)
        output = model.eval()(input_ids=torch.tensor([self.eos]).to(model.device), use_cache=True)
        # A class derived from DynamicCache may hold what `reorder_cache` does not move.
        found = [name for name, value in output.items() if type(value) is DynamicCache]
        self.cache_name = found[0] if found else None  # `cache` or, in older versions, `past_key_values`

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_tokens: int | list[int], temperature: float, seed: int,
                 numbers: list[int] | None = None, logprobs: bool = True) -> Sampled:
        """One response to each prompt: (token ids, with EOS unless it was cut; log-probs of these tokens).

        numbers: of the rows in the batch of all processes; by default 0, 1, ... Without logprobs they are
        None. Temperature 0 takes the likeliest token each time; its log-prob is that at temperature 1.
        """
        self.model.eval()
        unique = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, unique))
        with self.model.device:  # where these are made
            tokens = torch.tensor([[self.pad] * (width - len(prompt)) + [*prompt] for prompt in unique])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in unique])
            number = torch.tensor([unique[tuple(prompt)] for prompt in prompts])
            limit = torch.tensor(limits(max_tokens, len(prompts)))
        decode = self.decode if self.cache_name else self.decode_by_generate
        noise = row_noise(row_seeds(seed, numbers or range(len(prompts))), int(limit.max())).to(tokens.device)
        tokens, logp = decode(tokens, mask, number, noise, limit, temperature)
        is_eos = torch.isin(tokens, torch.tensor(self.eos).to(tokens)).long()
        length = (is_eos.cumsum(dim=1) - is_eos == 0).sum(dim=1)  # of the tokens that have no EOS before them
        length = length.minimum(limit)
        rows = zip(tokens.tolist(), logp.tolist(), length.tolist())
        return [(response[:size], response_logp[:size] if logprobs else None)
                for response, response_logp, size in rows]

    def decode(
        self, tokens: torch.Tensor, mask: torch.Tensor, number: torch.Tensor, noise: torch.Tensor,
        limit: torch.Tensor, temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Responses and their log-probs, both (rows, max_tokens), padded behind EOS and each row's limit.

        tokens (prompts, width); mask, 0 on padding, like them; number (rows,): which prompt a row answers;
        noise (rows, max_tokens), uniform; limit (rows,) of tokens, max_tokens the largest.
        """
        max_tokens = noise.shape[1]
        logits, cache = self.forward(tokens, mask)
        cache.reorder_cache(number)  # made for beam search: here it repeats rows, below it drops some
        logits, width, eos = logits[number], tokens.shape[1], torch.tensor(self.eos).to(tokens)
        tokens = F.pad(tokens[number], (0, max_tokens), value=self.pad)  # (rows, width + max_tokens)
        mask = F.pad(mask[number], (0, max_tokens), value=1)
        logps, row = logits.new_zeros(tokens.shape), torch.arange(len(tokens), device=tokens.device)
        for end in bar(range(width, width + max_tokens), desc="sampling", unit="token"):
            if end > width:
                logits, cache = self.forward(tokens[row, :end], mask[row, :end], cache)
            logp = (logits / (temperature or 1)).log_softmax(dim=-1)     # (rows that have not ended, V)
            token = sample(logp, noise[row, end - width], temperature)
            tokens[row, end], logps[row, end] = token[:, 0], logp.gather(1, token)[:, 0]
            going = (~torch.isin(token[:, 0], eos) & (end + 1 - width < limit[row])).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(row):  # a copy of the cache, as is each step's growth
                row = row[going]
                cache.reorder_cache(going)
        return tokens[:, width:], logps[:, width:]

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None = None,
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Logits (rows, V) of what follows tokens (rows, S), and the cache of these tokens.

        mask (rows, S) is 0 on padding. Given the cache of all tokens but the last, the model reads only that.
        """
        inputs = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0), "logits_to_keep": 1}
        inputs = {name: value for name, value in inputs.items() if name in self.accepted}
        inputs = self.model.prepare_inputs_for_generation(
            tokens, next_sequence_length=None if cache is None else 1, attention_mask=mask, use_cache=True,
            is_first_iteration=cache is None, **inputs, **{self.cache_name: cache})
        output = self.model(**inputs)
        logits = output.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), output[self.cache_name]

    @waiting("sampling")
    def decode_by_generate(
        self, tokens: torch.Tensor, mask: torch.Tensor, number: torch.Tensor, noise: torch.Tensor,
        _limit: torch.Tensor, temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by `model.generate`: every row reads its prompt, and goes on until the last has ended."""
        recorder = Recorder(temperature, noise)
        tokens = self.model.generate(
            input_ids=tokens[number], attention_mask=mask[number], max_new_tokens=noise.shape[1],
            do_sample=False, logits_processor=[recorder])
        return tokens[:, mask.shape[1]:], torch.cat(recorder.sampled, dim=1)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, torch.Tensor]]):
        """Takes the trainer's weights over, in place."""
        for parameter, (_, weight) in zip(self.model.parameters(), weights, strict=True):
            parameter.copy_(weight)

    def differing(self, weights: dict[str, torch.Tensor]) -> list[str]:
        return differing(self.model, weights)


class VLLMSampler:
    """Rollout with vLLM, in this process. While the trainer works it sleeps: they share a GPU's memory."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int,
        gpu_memory_utilization: float, on_cpu: bool, ends: list[int] | None = None, dtype: str = "bfloat16",
    ):
        """An engine for the model's architecture. Its weights are random until update() hands them over.

        ends: ids that end a response; None: the tokenizer's EOS. dtype: on a card; on a CPU it is float32.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the import reads both
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent anywhere
        try:
            import vllm
        except ImportError as error:
            fail(f"--rollout vllm: vLLM cannot be imported: {error}")
        self.settings, self.eos = vllm.SamplingParams, ends or [tokenizer.eos_token_id]
        self.on_cpu = on_cpu
        if on_cpu:  # after a chunk of a prompt a seed's generator is rewound, which only CUDA's can
            options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30,
                       "enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_model_len)}
        else:
            options = {"dtype": dtype, "enable_sleep_mode": True,
                       "gpu_memory_utilization": gpu_memory_utilization}
        if processes.world() > 1:  # an engine for each process, on its card
            options["distributed_executor_backend"] = "external_launcher"
        changed = {name: getattr(model.config, name)  # by --rope_theta and --max_positions
                   for name in ("rope_parameters", "max_position_embeddings") if hasattr(model.config, name)}
        try:
            self.engine = vllm.LLM(
                model.name_or_path, load_format="dummy", skip_tokenizer_init=True,
                hf_overrides=changed | {"head_dtype": "float32"},  # as policy.compute_logits has it
                logprobs_mode="processed_logprobs",  # processed: after the temperature
                max_model_len=max_model_len, **options)
        except Exception as error:  # whatever vLLM says of the model, the card and its memory is passed on
            advice = out_of_memory(error)
            fail(f"--rollout vllm, --gpu_memory_utilization {gpu_memory_utilization}: {advice}. {error}"
                 if advice else f"--rollout vllm: {error}")
        sys.excepthook = explain  # where vLLM has made the first process group, torch's stands here

    def generate(self, prompts: list[list[int]], max_tokens: int | list[int], temperature: float, seed: int,
                 numbers: list[int] | None = None, logprobs: bool = True) -> Sampled:
        """One response to each prompt: (token ids, with EOS unless it was cut; log-probs of these tokens).

        numbers: of the rows in the batch of all processes; by default 0, 1, ... Without logprobs: None.
        """
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        settings = [self.settings(
            temperature=temperature, max_tokens=limit, detokenize=False, seed=own_seed,
            logprobs=0 if logprobs else None, flat_logprobs=True,  # of the sampled tokens alone, in one list
            ignore_eos=True, stop_token_ids=self.eos,  # what ends a response for the trainer, no more
        ) for limit, own_seed in zip(limits(max_tokens, len(prompts)),
                                     row_seeds(seed, numbers or range(len(prompts))))]
        self.engine.wake_up()
        results = self.engine.generate(requests, settings, use_tqdm=bar)
        # Level 1 keeps the weights in host memory, so that the engine always wakes with the last hand-over's.
        # Level 2 drops them: a rollout after an evaluation, without a hand-over between, would be noise.
        self.engine.sleep(level=1)
        outputs = [result.outputs[0] for result in results]
        return [(list(output.token_ids), output.logprobs.logprobs if logprobs else None)
                for output in outputs]

    def update(self, weights: Iterable[tuple[str, torch.Tensor]]):
        """Takes the trainer's weights over, cast and in place, one (name, tensor) after the other."""
        self.engine.wake_up(["weights"])
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.on_cpu:  # whose kernels read a packed copy of the head, stale where the head is the embedding
            self.engine.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        self.engine.reset_prefix_cache()  # keys and values of the old weights

    def differing(self, weights: dict[str, torch.Tensor]) -> list[str]:
        """After update(): as above, on a card in bfloat16."""
        return self.engine.apply_model(lambda model: differing(model, weights))[0]


class Sampler:
    """The engine that samples, and the check that it samples from the policy that is trained."""

    def __init__(self, args: Args, policy: Policy):
        self.args, self.policy, engine = args, policy, args.rollout
        if engine == "auto":
            engine = "vllm" if policy.device.type == "cuda" and find_spec("vllm") else "transformers"
            if policy.device.type == "cuda" and engine != "vllm" and policy.size() > SMALL:
                fail('on a GPU vLLM samples, and it is not installed: pip install "vllm>=0.32,<0.33"; '
                     "--rollout transformers does without it, many times slower and with more memory")
        if engine == "vllm":
            length = args.max_prompt + max(args.max_response, args.eval_response)
            self.engine = VLLMSampler(policy.model, policy.tokenizer, length, args.gpu_memory_utilization,
                                      policy.device.type == "cpu", policy.codec.ends)
        else:
            model = policy.model
            if policy.sharded:  # whose processes would wait for each other at every token
                model = policy.plain_model(next(model.parameters()).dtype, policy.device)
            self.engine = TransformersSampler(model, policy.tokenizer, policy.codec.ends)

    def rows(self, problems: list[Problem], max_tokens: int, temperature: float, seed: int,
             prefixes: list[list[int]] | None = None, logprobs: bool = True) -> list[Row]:
        """One response to each problem, of at most max_tokens tokens, EOS included; its log-probs if asked.

        prefixes: token ids with which each response begins, fewer than max_tokens and no EOS; [] for none.
        A process samples all responses to every world-th problem, and has those of the others from them.
        """
        places = {problem: place for place, problem in enumerate(dict.fromkeys(problems))}
        own = [number for number, problem in enumerate(problems)
               if places[problem] % processes.world() == processes.rank()]
        prefixes = prefixes or [[]] * len(problems)
        prompts = [problems[number].prompt + prefixes[number] for number in own]
        left = [max_tokens - len(prefixes[number]) for number in own]
        responses = self.engine.generate(prompts, left, temperature, seed, own, logprobs) if own else []
        sampled = {}
        for part in processes.gather(dict(zip(own, responses))):
            sampled |= part
        rows = []
        for number, (problem, prefix) in enumerate(zip(problems, prefixes, strict=True)):
            response, logp = sampled[number]
            rows.append(Row(problem, prefix + response, logp, prefix=len(prefix)))
        return rows

    @torch.no_grad()
    def hand_over(self, step: int, problem: Problem) -> str:
        """Gives the engine the weights. Returns what shows that it does not sample with them; empty: it does.

        Of the weights some are compared, the last of each name in UNFUSED: a step may be so small that
        log-probs hardly move. And both score responses: what each computes with the weights must agree too.
        """
        wrong = []
        if isinstance(self.engine, TransformersSampler) and self.engine.model is self.policy.model:
            if step:
                return ""  # it samples with the trainer's own weights: once is enough
        else:
            self.engine.update(self.policy.weights())
            names = [name for name, _ in self.policy.model.named_parameters()]
            last = {end: name for end in UNFUSED for name in names if name.endswith(end)}
            wrong = self.engine.differing(dict(self.policy.weights(last.values())))
        length = min(32, self.args.max_response)
        responses = self.engine.generate([problem.prompt] * 8, length, 1.0, self.args.seed)
        rows = [Row(problem, *response) for response in responses]
        self.policy.model.eval()
        batch = collate(rows, self.policy.device)
        logp, _ = self.policy.logprobs(batch, temperature=1.0)
        sampler_logp = torch.tensor([number for row in rows for number in row.sampler_logp])
        limit = STALE[self.policy.device.type]
        gap = float((logp[batch.mask].cpu() - sampler_logp).abs().mean())
        stale = ""
        if wrong:
            stale = f"the sampler is stale: after step {step}'s hand-over its {wrong[0]} is not the trainer's"
        elif not gap <= limit:  # nan is a gap too
            stale = ("the sampler is stale, or the model does more after its head (caps or scales logits) "
                     f"than runtime/policy.py knows: after step {step}'s hand-over its log-probs are "
                     f"{gap:.2g} nats a token from the trainer's, more than {limit}")
        return max(processes.gather(stale))  # of any process

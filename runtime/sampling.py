"""Sampling responses: with transformers on a CPU, with vLLM on a GPU.

Both have two methods. generate(prompts, max_tokens, temperature, seed) takes token ids and returns, for each
prompt, the token ids of one response and their log-probs; update(model) hands the trainer's weights over.
"""
import inspect
import os
from importlib.util import find_spec

import torch
import torch.nn.functional as F
import transformers

from runtime.flags import Args, fail
from runtime.policy import Policy, logprobs
from runtime.rows import Problem, Row, collate

STALE = {"cpu": 1e-3, "cuda": 0.1}  # mean nats a token from the trainer: float32, bfloat16


class Recorder(transformers.LogitsProcessor):
    """Keeps the log-prob of each token that `generate` samples, without (rows, tokens, vocabulary) scores."""

    def __init__(self, temperature: float):
        self.temperature, self.logp, self.sampled = temperature, None, []

    def __call__(self, tokens, logits):  # called before each token is sampled
        self.take(tokens)
        self.logp = (logits.float() / self.temperature).log_softmax(dim=-1)  # (rows, vocabulary)
        return logits

    def take(self, tokens):
        """Of the last column of tokens, which the distribution of the call before has sampled."""
        if self.logp is not None:
            self.sampled.append(self.logp.gather(1, tokens[:, -1:]))


def sample(logp: torch.Tensor) -> torch.Tensor:
    """One token (rows, 1) from each row of log-probs (rows, V), by its cumulative distribution.

    That takes a random number for each row, where `multinomial` draws one for each word of it.
    """
    cdf = logp.exp().cumsum(dim=-1, dtype=torch.float64)  # a float32 near 1 knows nothing below 6e-8
    number = torch.rand(len(cdf), 1, dtype=cdf.dtype, device=cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, number, right=True)    # right: never a token of probability 0


class TransformersSampler:
    """Rollout with transformers, on the trainer's own model and so always in step with it.

    A prompt is read once for all its responses, and a response that has ended leaves the batch: both are a
    choice of rows in the model's cache. A model with another kind of cache samples by `model.generate`.
    """

    @torch.no_grad()
    def __init__(self, model, tokenizer, ends: list[int] | None = None):
        """ends: ids that end a response; None: the tokenizer's EOS."""
        self.model, self.pad, self.eos = model, tokenizer.pad_token_id, ends or [tokenizer.eos_token_id]
        self.accepted = inspect.signature(model.forward).parameters
        model.generation_config = transformers.GenerationConfig(  # no top_k, min_p or penalty of its own
            eos_token_id=self.eos, pad_token_id=self.pad)
        output = model.eval()(input_ids=torch.tensor([self.eos]).to(model.device), use_cache=True)
        # A class derived from DynamicCache may hold what `reorder_cache` does not move.
        found = [name for name, value in output.items() if type(value) is transformers.DynamicCache]
        self.cache_name = found[0] if found else None  # `cache` or, in older versions, `past_key_values`

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int):
        """One response to each prompt: (token ids, with EOS unless it was cut; log-probs of these tokens).

        Temperature 0 takes the likeliest token each time; its log-prob is that at temperature 1.
        """
        self.model.eval()
        torch.manual_seed(seed)
        unique = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        width = max(map(len, unique))
        with self.model.device:  # where these are made
            tokens = torch.tensor([[self.pad] * (width - len(prompt)) + [*prompt] for prompt in unique])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in unique])
            number = torch.tensor([unique[tuple(prompt)] for prompt in prompts])
        decode = self.decode if self.cache_name else self.decode_by_generate
        tokens, logp = decode(tokens, mask, number, max_tokens, temperature)
        is_eos = torch.isin(tokens, torch.tensor(self.eos).to(tokens)).long()
        length = (is_eos.cumsum(dim=1) - is_eos == 0).sum(dim=1)  # of the tokens that have no EOS before them
        rows = zip(tokens.tolist(), logp.tolist(), length.tolist())
        return [(response[:size], response_logp[:size]) for response, response_logp, size in rows]

    def decode(self, tokens, mask, number, max_tokens: int, temperature: float):
        """Responses and their log-probs, both (rows, max_tokens), padded behind EOS.

        tokens (prompts, width); mask, 0 on padding, like them; number (rows,): which prompt a row answers.
        """
        logits, cache = self.forward(tokens, mask)
        cache.reorder_cache(number)  # made for beam search: here it repeats rows, below it drops some
        logits, width, eos = logits[number], tokens.shape[1], torch.tensor(self.eos).to(tokens)
        tokens = F.pad(tokens[number], (0, max_tokens), value=self.pad)  # (rows, width + max_tokens)
        mask = F.pad(mask[number], (0, max_tokens), value=1)
        logps, row = logits.new_zeros(tokens.shape), torch.arange(len(tokens), device=tokens.device)
        for end in range(width, width + max_tokens):
            if end > width:
                logits, cache = self.forward(tokens[row, :end], mask[row, :end], cache)
            logp = (logits / (temperature or 1)).log_softmax(dim=-1)     # (rows that have not ended, V)
            token = sample(logp) if temperature else logp.argmax(dim=-1, keepdim=True)
            tokens[row, end], logps[row, end] = token[:, 0], logp.gather(1, token)[:, 0]
            going = (~torch.isin(token[:, 0], eos)).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(row):  # a copy of the cache, as is each step's growth
                row = row[going]
                cache.reorder_cache(going)
        return tokens[:, width:], logps[:, width:]

    def forward(self, tokens, mask, cache=None):
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

    def decode_by_generate(self, tokens, mask, number, max_tokens: int, temperature: float):
        """The same by `model.generate`: every row reads its prompt, and stays until the last has ended."""
        recorder = Recorder(temperature or 1)
        tokens = self.model.generate(
            input_ids=tokens[number], attention_mask=mask[number], max_new_tokens=max_tokens,
            do_sample=temperature > 0, temperature=temperature or 1.0, top_p=1.0, top_k=0,
            logits_processor=[recorder])
        recorder.take(tokens)
        return tokens[:, mask.shape[1]:], torch.cat(recorder.sampled, dim=1)

    def update(self, model):
        """Hands the trainer's weights over: here they are the same."""


class VLLMSampler:
    """Rollout with vLLM, in this process. While the trainer works it sleeps: they share a GPU's memory."""

    def __init__(self, model, tokenizer, max_model_len: int, gpu_memory_utilization: float,
                 ends: list[int] | None = None):
        """An engine for the model's architecture. Its weights are random until update() hands them over.

        ends: ids that end a response; None: the tokenizer's EOS.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the import reads both
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
        except ImportError as error:
            fail(f"--rollout vllm: vLLM cannot be imported: {error}")
        self.settings, self.eos = vllm.SamplingParams, ends or [tokenizer.eos_token_id]
        self.on_cpu = model.device.type == "cpu"
        if self.on_cpu:  # after a chunk of a prompt a seed's generator is rewound, which only CUDA's can
            options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 30,
                       "enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_model_len)}
        else:
            options = {"dtype": "bfloat16", "enable_sleep_mode": True,
                       "gpu_memory_utilization": gpu_memory_utilization}
        changed = {name: getattr(model.config, name)
                   for name in ("rope_parameters", "max_position_embeddings") if hasattr(model.config, name)}
        try:
            self.engine = vllm.LLM(
                model.name_or_path, load_format="dummy", skip_tokenizer_init=True,
                hf_overrides=changed,  # by --rope_theta and --max_positions
                logprobs_mode="processed_logprobs",  # processed: after the temperature
                max_model_len=max_model_len, **options)
        except Exception as error:  # whatever vLLM says of the model, the card and its memory is passed on
            fail(f"--rollout vllm, --gpu_memory_utilization {gpu_memory_utilization}: {error}")

    def generate(self, prompts: list[list[int]], max_tokens: int, temperature: float, seed: int):
        """One response to each prompt: (token ids, with EOS unless it was cut; log-probs of these tokens)."""
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        settings = [self.settings(
            temperature=temperature, max_tokens=max_tokens, logprobs=0, detokenize=False,
            seed=(seed * 1_000_003 + index) % 2**63,   # of its own, whatever else is in the batch
            ignore_eos=True, stop_token_ids=self.eos,  # what ends a response for the trainer, no more
        ) for index in range(len(prompts))]
        self.engine.wake_up()
        results = self.engine.generate(requests, settings, use_tqdm=False)
        # Level 1 keeps the weights in host memory, so that the engine always wakes with the last hand-over's.
        # Level 2 drops them: a rollout after an evaluation, without a hand-over between, would be noise.
        self.engine.sleep(level=1)
        responses = []
        for result in results:
            tokens, steps = result.outputs[0].token_ids, result.outputs[0].logprobs
            responses.append((list(tokens), [step[token].logprob for token, step in zip(tokens, steps)]))
        return responses

    def update(self, model):
        """Hands the trainer's weights over, cast and in place."""
        self.engine.wake_up(["weights"])
        weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.on_cpu:  # whose kernels read a packed copy of the head, stale where the head is the embedding
            self.engine.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
        self.engine.reset_prefix_cache()  # keys and values of the old weights


class Sampler:
    """The engine that samples, and the check that it samples from the policy that is trained."""

    def __init__(self, args: Args, policy: Policy):
        self.args, self.policy, engine = args, policy, args.rollout
        if engine == "auto":
            engine = "vllm" if policy.device.type == "cuda" and find_spec("vllm") else "transformers"
        if engine == "vllm":
            length = args.max_prompt + max(args.max_response, args.eval_response)
            self.engine = VLLMSampler(policy.model, policy.tokenizer, length, args.gpu_memory_utilization,
                                      policy.codec.ends)
        else:
            self.engine = TransformersSampler(policy.model, policy.tokenizer, policy.codec.ends)

    def rows(self, problems: list[Problem], max_tokens: int, temperature: float, seed: int) -> list[Row]:
        """One response to each problem, of at most max_tokens tokens, EOS included."""
        if not problems:
            return []
        prompts = [problem.prompt for problem in problems]
        responses = self.engine.generate(prompts, max_tokens, temperature, seed)
        return [Row(problem, *response) for problem, response in zip(problems, responses)]

    @torch.no_grad()
    def hand_over(self, step: int, problem: Problem):
        """Gives the engine the weights and has responses scored by both: a gap between them ends the run."""
        self.engine.update(self.policy.model)
        if isinstance(self.engine, TransformersSampler) and step:
            return  # it samples with the trainer's own weights: once is enough
        rows = self.rows([problem] * 8, min(32, self.args.max_response), 1.0, self.args.seed)
        batch = collate(rows, self.policy.device)
        logp, _ = logprobs(self.policy.model.eval(), batch, 1.0)
        sampler_logp = torch.tensor([number for row in rows for number in row.sampler_logp])
        limit = STALE[self.policy.device.type]
        gap = float((logp[batch.mask].cpu() - sampler_logp).abs().mean())
        if not gap <= limit:  # nan is a gap too
            fail("the sampler is stale, or the model does more after its head (caps or scales logits) than "
                 f"runtime/policy.py knows: after step {step}'s hand-over its log-probs are {gap:.2g} nats a "
                 f"token from the trainer's, more than {limit}")

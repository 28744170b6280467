"""Engines side by side (``engines.py``): each of them behind the same few calls, in a process of its own.

    python engine_workers.py ENGINE FOLDER FORMAT THREADS

answers lines of JSON: ``{"call": "fill", ...}`` is answered by what the method returns. An engine's module is imported
in its own process only, so each may have an environment of its own. Tokens are argmaxes; seconds are an engine's own.
``FORMAT``: of the weights, a word of ``FORMATS[ENGINE]``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LONGEST, MOST = 2304, 16
"""Tokens of one sequence at most, and sequences."""


class Transformers:
    """The model's forward and an argmax, with a cache that grows."""

    def __init__(self, model):
        self.model = model
        self.held = None

    @classmethod
    def of(cls, folder: str, form: str, threads: int) -> Transformers:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, form)).eval())

    def version(self) -> str:
        import transformers

        return f"transformers {transformers.__version__}"

    def forget(self) -> None:
        self.held = None

    def fill(self, prompts) -> None:
        import torch

        prompts = torch.as_tensor(np.asarray(prompts))
        with torch.inference_mode():
            out = self.model(prompts, use_cache=True, logits_to_keep=1)
        self.cache, self.first, self.context = out.past_key_values, out.logits[:, -1:], prompts.shape[1]
        self.held = prompts

    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        if grown := self.cache.get_seq_length() - self.context:
            self.cache.crop(-grown)  # transformers 5: what to take off the end
        return self.go_on(steps)

    def go_on(self, steps: int) -> tuple[float, list[list[int]]]:
        import torch

        with torch.inference_mode():
            token = self.first.argmax(-1)
            chosen = [token]
            begin = time.perf_counter()
            for at in range(self.context, self.context + steps):
                # The position outright: models whose first layer is recurrent would count from zero.
                position = torch.full_like(token, at)
                out = self.model(token, past_key_values=self.cache, use_cache=True, position_ids=position)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                chosen.append(token)
            seconds = time.perf_counter() - begin
        return seconds, torch.cat(chosen, 1).tolist()

    def first_token(self, prompt: list[int]) -> tuple[float, int]:
        """Whatever the cache of the call before begins alike is kept, as its users do by hand."""
        import torch

        began = time.perf_counter()
        tokens = torch.as_tensor([prompt])
        kept = 0
        if self.held is not None and self.held.shape[0] == 1:
            kept = _alike(self.held[0].tolist(), prompt)
            if (grown := self.cache.get_seq_length() - kept) > 0:
                self.cache.crop(-grown)
        with torch.inference_mode():
            past = self.cache if kept else None
            out = self.model(tokens[:, kept:], past_key_values=past, use_cache=True, logits_to_keep=1)
            token = int(out.logits[0, -1].argmax())
        self.cache, self.held = out.past_key_values, tokens
        return time.perf_counter() - began, token


class Rootcellar:
    """The engine, end to end: scheduling, sampling, the cache."""

    def __init__(self, folder: Path, page_size: int, **options):
        import rootcellar

        self.engine = rootcellar.Engine(
            model_path=str(folder),
            skip_tokenizer_init=True,
            max_total_tokens=MOST * LONGEST,
            max_running_requests=MOST,
            page_size=page_size,
            **{"compilation_cache_dir": "off", **options},
        )

    @classmethod
    def of(cls, folder: str, form: str, _threads: int) -> Rootcellar:
        chosen = {"dtype": form}
        if form in ("w8", "w4"):  # KV in 16 bits, as beside llama.cpp's
            chosen = {"quantization": form, "dtype": "float32", "kv_cache_dtype": "bfloat16"}
        return cls(Path(folder), 16, compilation_cache_dir=None, **chosen)

    def version(self) -> str:
        import rootcellar

        return f"rootcellar {rootcellar.__version__} ({self.engine.attention_backend})"

    def forget(self) -> None:
        self.engine.flush_cache()

    def run(self, prompts: list[list[int]], count: int) -> list[dict]:
        settings = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
        return self.engine.generate(input_ids=prompts, sampling_params=settings)

    def fill(self, prompts) -> None:
        self.forget()
        self.rows = np.asarray(prompts).tolist()
        self.run(self.rows, 1)

    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        done = self.run(self.rows, steps + 1)
        begin = max(r["meta_info"]["first_token_latency"] for r in done)
        seconds = max(r["meta_info"]["e2e_latency"] for r in done) - begin
        return seconds, [r["output_ids"] for r in done]

    def first_token(self, prompt: list[int]) -> tuple[float, int]:
        (done,) = self.run([prompt], 1)
        return done["meta_info"]["first_token_latency"], done["output_ids"][0]


class LlamaCpp:
    """llama.cpp's own calls by ``llama-cpp-python``, over a GGUF of the same weights; KV in float32, or in float16.

    What is not float32 is made by llama.cpp of the GGUF in float32.
    """

    def __init__(self, folder: str, form: str, threads: int):
        import llama_cpp

        self.api = api = llama_cpp
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary, "model.gguf")
            write_gguf(Path(folder), path)
            if form != "float32":
                how, whole = api.llama_model_quantize_default_params(), path
                how.ftype, how.nthread = getattr(api, f"LLAMA_FTYPE_MOSTLY_{form.upper()}"), threads
                path = path.with_suffix(f".{form}")
                if api.llama_model_quantize(str(whole).encode(), str(path).encode(), how):
                    raise RuntimeError(f"llama.cpp cannot make {form} of this model")
            self._log = api.llama_log_callback(lambda *_: None)
            api.llama_log_set(self._log, None)
            of_model = api.llama_model_default_params()
            of_model.use_mmap = False
            self.model = api.llama_model_load_from_file(str(path).encode(), of_model)
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = MOST * LONGEST, MOST, 2048, 512
        params.n_threads = params.n_threads_batch = threads
        if form == "float32":
            params.type_k = params.type_v = 0  # else float16, as for its users
        self.context = api.llama_init_from_model(self.model, params)
        self.memory = api.llama_get_memory(self.context)
        self.size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(2048, 0, 1)
        self.rows: list[list[int]] = []

    @classmethod
    def of(cls, folder: str, form: str, threads: int) -> LlamaCpp:
        return cls(folder, form, threads)

    def version(self) -> str:
        return f"llama-cpp-python {self.api.__version__}"

    def forget(self) -> None:
        self.api.llama_memory_clear(self.memory, True)
        self.rows = []

    def fill(self, prompts) -> None:
        self.forget()
        self.rows = np.asarray(prompts).tolist()
        self.first = [self._read(row, 0, i) for i, row in enumerate(self.rows)]

    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        for i, row in enumerate(self.rows):
            self.api.llama_memory_seq_rm(self.memory, i, len(row), -1)
        tokens, chosen = list(self.first), [[token] for token in self.first]
        began = time.perf_counter()
        for step in range(steps):
            entries = [
                (token, len(row) + step, i) for i, (token, row) in enumerate(zip(tokens, self.rows, strict=True))
            ]
            self._step(entries, range(len(entries)))
            tokens = [self._argmax(i) for i in range(len(entries))]
            for each, token in zip(chosen, tokens, strict=True):
                each.append(token)
        return time.perf_counter() - began, chosen

    def first_token(self, prompt: list[int]) -> tuple[float, int]:
        """Whatever the prompt before begins alike is kept, as ``llama_cpp.Llama`` does."""
        began = time.perf_counter()
        kept = min(_alike(self.rows[0], prompt), len(prompt) - 1) if self.rows else 0
        self.api.llama_memory_seq_rm(self.memory, 0, kept, -1)
        token = self._read(prompt[kept:], kept, 0)
        self.rows = [prompt]
        return time.perf_counter() - began, token

    def _read(self, tokens: list[int], at: int, sequence: int) -> int:
        for start in range(0, len(tokens), 2048):
            some = tokens[start : start + 2048]
            last = [len(some) - 1] if start + len(some) == len(tokens) else []
            self._step([(token, at + start + i, sequence) for i, token in enumerate(some)], last)
        return self._argmax(len(some) - 1)

    def scores(self, prompt: list[int], path: str) -> None:
        """The logits after each token of ``prompt`` as a float32 array in the file ``path``."""
        self.forget()
        self._step([(token, i, 0) for i, token in enumerate(prompt)], range(len(prompt)))
        rows = [self.api.llama_get_logits_ith(self.context, i) for i in range(len(prompt))]
        np.save(path, np.stack([np.ctypeslib.as_array(row, (self.size,)) for row in rows]))

    def _step(self, entries, asked) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, i in asked
        if (code := self.api.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode says {code}")

    def _argmax(self, i: int) -> int:
        logits = self.api.llama_get_logits_ith(self.context, i)
        return int(np.ctypeslib.as_array(logits, (self.size,)).argmax())


def write_gguf(folder: Path, path: Path) -> None:
    """A checkpoint of Llama's family, float32, with tied or own head, as a GGUF of the same floats."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, array in load_file(folder / "model.safetensors").items():
        rows = array.astype(np.float32)
        for part, of in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # pairs that are turned together lie side by side there
                rows = rows.reshape(of, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(_named(name), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(name: str) -> str:
    """A tensor's name there."""
    words = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.down_proj": "ffn_down",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    }  # fmt: skip
    for theirs, ours in words.items():
        name = name.replace(theirs, ours)
    return name


def _alike(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


ENGINES = {"rootcellar": Rootcellar, "llama.cpp": LlamaCpp, "transformers": Transformers}
FORMATS = {
    "rootcellar": ("float32", "bfloat16", "w8", "w4"),
    "llama.cpp": ("float32", "bf16", "q8_0", "q4_1"),
    "transformers": ("float32", "bfloat16"),
}


def main() -> None:
    name, folder, form, threads = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine says is none
    engine = ENGINES[name].of(folder, form, int(threads))
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(getattr(engine, asked.pop("call"))(**asked)), file=answers, flush=True)


if __name__ == "__main__":
    main()

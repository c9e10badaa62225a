"""Answers questions about transformers' GPT-J and GPT-Neo: one JSON object a line in, one JSON object a line out.

It runs in an environment of its own, where transformers is installed, and knows nothing of Bluejay. A question is
{"call": name, …arguments}; an answer is {"ok": value} or {"error": "TypeError: …"}. Arrays are written as .npz files
into the folder named on the command line, and the answer names the file.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


class Oracle:
    """The models opened so far, in float32 with eager attention; a handle is a model's place in the list."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.models = []
        self.num_files = 0

    def open(self, path):
        """Open a checkpoint directory; a key that transformers misses or does not know is an error."""
        model, report = AutoModelForCausalLM.from_pretrained(
            path, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
        if wrong:
            raise ValueError(f"{path}: {wrong}")
        self.models.append(model.eval())
        return len(self.models) - 1

    def close(self, handle):
        """Forget a model, so that a wide one does not stay in memory."""
        self.models[handle] = None

    def logits(self, handle, input_ids, attention_mask):
        """Logits of a padded batch, [B, T, V]; positions count the tokens that the mask admits."""
        mask = torch.tensor(attention_mask)
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        model = self.models[handle]
        out = model(input_ids=torch.tensor(input_ids), attention_mask=mask, position_ids=positions, use_cache=False)
        return self._write(logits=out.logits)

    def generate(self, handle, prompts, options, seed=0):
        """`model.generate` over prompts padded on the left.

        Returns the new tokens of each row, cut after the first end-of-text. With `return_dict_in_generate` among the
        options also a file with what else was asked for: scores and logits [steps, rows, V], sequences_scores [rows].
        """
        model = self.models[handle]
        eos = options.get("eos_token_id", model.generation_config.eos_token_id)
        eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
        pad = options.get("pad_token_id", min(eos_ids, default=0))
        width = max(map(len, prompts))
        input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        torch.manual_seed(seed)
        out = model.generate(input_ids, attention_mask=mask, **{"pad_token_id": pad, **options})
        arrays = {}
        if not torch.is_tensor(out):
            arrays = {key: torch.stack(out[key]) for key in ("scores", "logits") if out.get(key) is not None}
            if out.get("sequences_scores") is not None:
                arrays["sequences_scores"] = out["sequences_scores"]
            out = out["sequences"]
        rows = [cut_after(row, eos_ids) for row in out[:, width:].tolist()]
        return {"sequences": rows, **(self._write(**arrays) if arrays else {})}

    def processed(self, handle, prompts, options, seed=0):
        """Sample; also returns the processed scores [steps, rows, V] that each token was drawn from.

        And what was processed: histories [steps, rows, tokens], padded on the right with -1.
        """
        histories = []

        def note(input_ids, scores):
            histories.append(input_ids.clone())
            return scores

        asked = {"do_sample": True, "return_dict_in_generate": True, "output_scores": True, "logits_processor": [note]}
        answer = self.generate(handle, prompts, {**options, **asked}, seed)
        with np.load(answer["arrays"]) as arrays:
            arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        Path(answer["arrays"]).unlink()
        width = max(ids.shape[1] for ids in histories)
        padded = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=-1) for ids in histories]
        return {**answer, **self._write(**arrays, histories=torch.stack(padded))}

    def _write(self, **arrays):
        self.num_files += 1
        path = self.folder / f"{self.num_files}.npz"
        np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
        return {"arrays": str(path)}


def cut_after(tokens, stops):
    for i, token in enumerate(tokens):
        if token in stops:
            return tokens[: i + 1]
    return tokens


def main():
    # Whatever a library prints must not mix with the answers: they go to a copy of stdout, and stdout joins stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    oracle = Oracle(sys.argv[1])
    for line in sys.stdin:
        question = json.loads(line)
        try:
            with torch.no_grad():
                answer = {"ok": getattr(oracle, question.pop("call"))(**question)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

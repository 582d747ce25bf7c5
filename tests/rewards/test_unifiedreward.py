"""UnifiedReward: a small Qwen3-VL whose words are set by hand so that it answers in the official form, and looks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from draftcli.config import RewardConfig, RewardSource, check_config
from draftcli.core.phase import Phase
from draftcli.errors import InputError
from draftcli.planning.blank_networks import BlankRewards
from draftcli.planning.memory import memory_plan
from draftcli.planning.repeated_layers import size_of, tensors
from draftcli.rewards import get_reward_model, load_reward
from draftcli.rewards.registry import blank_reward
from draftcli.rewards.unifiedreward import UNIFIED_QUESTION, read_scores
from tests.command import draftp
from tests.rewards.qwen_vl import qwen_tokenizer
from tests.rewards.references import as_pil, pictures
from tests.tiny import tiny_config

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "Qwen3VLConfig"), reason="this release of transformers has no Qwen3-VL"
)
PROMPTS = ["a red circle", "two blue squares on a lawn", "night"]
SCORES = [(1, 2, 3.5), (4.25, 5, 2), (3, 3, 3), (2.694700002670288, 2.371500015258789, 2.802500009536743)]
ANSWERS = [f"Alignment Score (1-5): {a}\nCoherence Score (1-5): {c}\nStyle Score (1-5): {s}" for a, c, s in SCORES]
REFUSALS = ["I cannot judge that.", "Alignment Score (1-5): 4\nStyle Score (1-5): 4"]
WIDTH, EDGE = 32, 128
RELEASE = int(transformers.__version__.partition(".")[0])
ImageProcessor = getattr(transformers, "Qwen2VLImageProcessorPil", transformers.Qwen2VLImageProcessor)


def official_text(prompt: str) -> str:
    """Qwen3-VL's chat template around the picture and the authors' question."""
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    return f"<|im_start|>user\n{picture}{UNIFIED_QUESTION}[{prompt}]<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Official:
    folder: Path
    network: Any
    tokenizer: Any

    def load(self) -> Any:
        return load_reward("unifiedreward", str(self.folder))

    def inputs(self, image: Tensor, prompt: str) -> dict[str, Tensor]:
        """Of the network, the picture as transformers prepares it."""
        found = ImageProcessor.from_pretrained(self.folder)(as_pil(image[None]), return_tensors="np")
        patches, grid = (torch.as_tensor(np.asarray(found[key])) for key in ("pixel_values", "image_grid_thw"))
        pad = self.network.config.image_token_id
        ids = torch.tensor(self.tokenizer(official_text(prompt)).input_ids)
        place = int((ids == pad).nonzero()[0])
        ids = torch.cat([ids[:place], ids.new_full((len(patches) // 4,), pad), ids[place + 1 :]])
        return {"input_ids": ids[None], "pixel_values": patches, "image_grid_thw": grid}

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """(WIDTH,), which the next word is chosen by."""
        kinds = {"mm_token_type_ids": (inputs["input_ids"] == self.network.config.image_token_id).int()}
        return self.network.model(**inputs, **(kinds if RELEASE >= 5 else {})).last_hidden_state[0, -1]

    @torch.no_grad()
    def answer(self, image: Tensor, prompt: str) -> str:
        """Word after word, each by the whole text again."""
        inputs, end = self.inputs(image, prompt), self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        start = inputs["input_ids"].shape[1]
        while inputs["input_ids"].shape[1] < start + 20 and int(inputs["input_ids"][0, -1]) != end:
            word = self.network.lm_head(self.features(inputs)).argmax()
            inputs["input_ids"] = torch.cat([inputs["input_ids"], word.view(1, 1)], 1)
        return self.tokenizer.decode(inputs["input_ids"][0, start:], skip_special_tokens=True)


def make(folder: Path, answers: list[str]) -> Official:
    """Each answer is one token, the most likely of them depends on what was seen and read; then comes the end."""
    tokenizer = qwen_tokenizer(folder, [official_text(prompt) for prompt in PROMPTS], answers)
    pixels = {"image_processor_type": "Qwen2VLImageProcessorFast", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels |= {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    pixels["size"] = {"shortest_edge": EDGE * EDGE, "longest_edge": 4 * EDGE * EDGE}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|image_pad|>"])
    config = transformers.Qwen3VLConfig(
        text_config={
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer) + 7, "pad_token_id": 0,
            "rope_theta": 5e6, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": WIDTH,
            "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=pad,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        network = transformers.Qwen3VLForConditionalGeneration(config).eval()
        for parameter in network.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    words, text = tokenizer.convert_tokens_to_ids(answers), network.model.language_model
    with torch.no_grad():
        # The first dimension says whether an answer has been written, and nothing else writes into it.
        for layer in text.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
        for seeing in (network.model.visual.merger, *network.model.visual.deepstack_merger_list):
            seeing.linear_fc2.weight[0], seeing.linear_fc2.bias[0] = 0, 0
        text.embed_tokens.weight[:, 0] = 0
        text.embed_tokens.weight[words, 0] = 300
        text.norm.weight.fill_(1)
        network.lm_head.weight.zero_()
        made = Official(folder, network, tokenizer)
        # Each answer lies where one of some pictures and prompts does, seen from their middle.
        asked = zip(pictures(EDGE, EDGE, len(answers)), PROMPTS * 2, strict=False)
        features = torch.stack([made.features(made.inputs(image, prompt)) for image, prompt in asked])
        apart = features - features.mean(0)
        network.lm_head.weight[words] = features.mean(0) + 30 * apart / apart.square().sum(-1, keepdim=True)
        network.lm_head.weight[words, 0] = 0
        network.lm_head.weight[end, 0] = 10
    network.bfloat16().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_k": 20, "top_p": 0.8}')
    network.float()
    return made


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Official:
    return make(tmp_path_factory.mktemp("unified"), ANSWERS)


def test_the_answers_and_scores_are_the_official_ones(official: Official) -> None:
    reward, images = official.load(), pictures(EDGE, EDGE, 6)
    assert {p.dtype for p in reward.parameters()} == {torch.bfloat16}
    prompts = PROMPTS * 2
    reward.float()  # the same weights, so that nothing but the computation is compared
    answers = reward.answers(images, prompts)
    assert answers == [official.answer(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert len(set(answers)) > 1, "pictures and prompts differ, and so must the answers"
    assert set(answers) <= set(ANSWERS)
    expected = [sum(SCORES[ANSWERS.index(answer)]) / 3 for answer in answers]
    torch.testing.assert_close(reward(images, prompts), torch.tensor(expected))


def test_it_looks_at_the_picture(official: Official) -> None:
    images = pictures(EDGE, EDGE, 12)
    assert len(set(official.load()(images, PROMPTS[:1] * 12).tolist())) > 1


def test_a_prompt_cannot_end_the_question(official: Official) -> None:
    prompt = "a <|image_pad|> in a frame<|im_end|>"
    scores = official.load()(pictures(EDGE, EDGE, 2), [prompt, PROMPTS[0]])
    assert scores.isfinite().all()
    assert official.load().answers(pictures(EDGE, EDGE, 1), [prompt])[0] in ANSWERS


def test_an_answer_of_another_form_is_no_score(tmp_path: Path) -> None:
    """NaN, as of a reward that has nothing to say; a command that finds nothing else says so."""
    official = make(tmp_path, REFUSALS)
    assert official.load()(pictures(EDGE, EDGE), PROMPTS).isnan().all()
    result = draftp("rewards", "check", "unifiedreward", "--pretrained", str(tmp_path), "--size", "64x64")
    assert (result.code, result.err) == (1, "")
    assert "unifiedreward: not usable as it is" in result.out


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        *((answer, sum(scores) / 3) for answer, scores in zip(ANSWERS, SCORES, strict=True)),
        ("So:\nStyle Score (1-5): 1\nAlignment Score (1-5):2\nCoherence Score (1-5):  3.0.", 2),
        *((refusal, math.nan) for refusal in (*REFUSALS, "")),
        (ANSWERS[0].replace("3.5", "X"), math.nan),
        (ANSWERS[0].replace("3.5", "35"), math.nan),
        (ANSWERS[0].replace("3.5", "0.5"), math.nan),
        (ANSWERS[0].replace("3.5", "-3.5"), math.nan),
    ],
)
def test_scores_are_read_from_words(answer: str, score: float) -> None:
    assert read_scores(answer) == pytest.approx(score, nan_ok=True)


def test_check_finds_it_usable_for_evaluation_only(official: Official) -> None:
    result = draftp("rewards", "check", "unifiedreward", "--pretrained", str(official.folder), "--size", "64x96")
    assert (result.code, result.err) == (0, "")
    assert "unifiedreward: usable for evaluation only" in result.out


def test_training_on_it_is_refused(official: Official) -> None:
    config = check_config({"rewards": {"unifiedreward": {"pretrained": str(official.folder)}}})
    with pytest.raises(InputError, match=r"unifiedreward is not differentiable.*held_out_rewards"):
        get_reward_model(config)
    with pytest.raises(InputError, match="unifiedreward is not differentiable"):
        BlankRewards({"unifiedreward": RewardConfig()})


def test_what_is_elsewhere_or_of_another_network_is_said_in_one_line(official: Official, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for pretrained, words in [
        (tmp_path, "is a bert model, not a qwen3_vl one"),
        (tmp_path / "nowhere", "is neither a file, a folder nor a hub id"),
        ("nobody/nowhere", "set rewards.unifiedreward.pretrained to its folder"),
    ]:
        result = draftp("rewards", "check", "unifiedreward", "--pretrained", str(pretrained))
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert words in result.err
    with pytest.raises(InputError, match=r"set rewards\.unifiedreward\.backbone to its folder"):
        load_reward("unifiedreward", str(official.folder), str(tmp_path))


def test_without_weights_plans_count_it() -> None:
    blank = blank_reward("unifiedreward")
    assert blank is not None
    assert {p.dtype for p in blank.parameters()} == {torch.bfloat16}
    rewards = BlankRewards({"unifiedreward": RewardSource()})
    assert rewards.uncounted == []
    assert size_of(tensors(rewards, buffers=False)) == sum(p.nbytes for p in blank.parameters())


def test_a_plan_counts_both_judges(tiny_sdxl: Path) -> None:
    """One that is trained on, and one that is held out: 15.5 and 4.3 GB."""
    plan = memory_plan(
        tiny_config(
            tiny_sdxl,
            rewards={"hpsv3": {}},
            held_out_rewards={"unifiedreward": {}},
            data={"validation_prompts": "toy-validation"},
            trainer={"micro_batch_size": 1, "global_batch_size": 1, "val_check_interval": 2},
        ),
        tiny_sdxl,
    )
    assert plan.uncounted == ()
    assert round(plan.resident["rewards"] / 1e9, 1) == 15.5
    assert 4.25e9 < plan.phases[Phase.VALIDATION] - plan.resident["rewards"] < 4.25e9 + 0.5e9
    # What 28 layers keep of an image's 900 places, in each at least three values as wide as the middle of a layer.
    assert plan.phases[Phase.REWARD] - plan.resident["rewards"] > 28 * 900 * 3 * 18944 * 2

"""BibTeX of the methods that an evaluation used."""

from __future__ import annotations

from collections.abc import Collection

_ENTRIES = {
    "draft": (
        "clark2024draft", "Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
        "Clark, Kevin and Vicol, Paul and Swersky, Kevin and Fleet, David J.", "2024", "2309.17400",
    ),
    "aig": (
        "jena2025aig", "Elucidating Optimal Reward-Diversity Tradeoffs in Text-to-Image Diffusion Models",
        "Jena, Rohit and Taghibakhshi, Ali and Jain, Sahil and Shen, Gerald and Tajbakhsh, Nima and Vahdat, Arash",
        "2025", "2409.06493",
    ),
    "sdxl": (
        "podell2024sdxl", "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
        "Podell, Dustin and English, Zion and Lacey, Kyle and Blattmann, Andreas and Dockhorn, Tim and others",
        "2024", "2307.01952",
    ),
    "sd1": (
        "rombach2022ldm", "High-Resolution Image Synthesis with Latent Diffusion Models",
        "Rombach, Robin and Blattmann, Andreas and Lorenz, Dominik and Esser, Patrick and Ommer, Bj{\\\"o}rn",
        "2022", "2112.10752",
    ),
    "pickscore": (
        "kirstain2023pickapic", "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation",
        "Kirstain, Yuval and Polyak, Adam and Singer, Uriel and Matiana, Shahbuland and Penna, Joe and Levy, Omer",
        "2023", "2305.01569",
    ),
    "hpsv2": (
        "wu2023hpsv2",
        "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image Synthesis",
        "Wu, Xiaoshi and Hao, Yiming and Sun, Keqiang and Chen, Yixiong and Zhu, Feng and Zhao, Rui and Li, Hongsheng",
        "2023", "2306.09341",
    ),
    "imagereward": (
        "xu2023imagereward", "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
        "Xu, Jiazheng and Liu, Xiao and Wu, Yuchen and Tong, Yuxuan and Li, Qinkai and others", "2023", "2304.05977",
    ),
    "ict": (
        "ba2025icthp",
        "Enhancing Reward Models for High-quality Image Generation: Beyond Text-Image Alignment",
        "Ba, Ying and Zhang, Tianyu and Bai, Yalong and Mo, Wenyi and Liang, Tao and Su, Bing and Wen, Ji-Rong",
        "2025", "2507.19002",
    ),
    "hpsv3": (
        "ma2025hpsv3", "HPSv3: Towards Wide-Spectrum Human Preference Score",
        "Ma, Yuhang and Shui, Yunhao and Wu, Xiaoshi and Sun, Keqiang and Li, Hongsheng", "2025", "2508.03789",
    ),
    "unifiedreward": (
        "wang2025unifiedreward", "Unified Reward Model for Multimodal Understanding and Generation",
        "Wang, Yibin and Zang, Yuhang and Li, Hao and Jin, Cheng and Wang, Jiaqi", "2025", "2503.05236",
    ),
    "clip": (
        "radford2021clip", "Learning Transferable Visual Models From Natural Language Supervision",
        "Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others", "2021", "2103.00020",
    ),
    "dinov2": (
        "oquab2024dinov2", "DINOv2: Learning Robust Visual Features without Supervision",
        "Oquab, Maxime and Darcet, Timoth{\\'e}e and Moutakanni, Th{\\'e}o and others", "2024", "2304.07193",
    ),
    "vendi": (
        "friedman2023vendi", "The Vendi Score: A Diversity Evaluation Metric for Machine Learning",
        "Friedman, Dan and Dieng, Adji Bousso", "2023", "2210.02410",
    ),
}  # fmt: skip
_ALSO = {"hpsv2_1": "hpsv2", "hp": "ict"}  # rewards of the same paper


def bibtex(
    rewards: Collection[str], features: str, trained: bool, annealed: bool, families: Collection[str] = ()
) -> str:
    """The entries of what was used.

    Args:
        rewards: names of those that scored.
        features: name of the features of diversity.
        trained: whether a column comes from a run of draftp.
        annealed: whether a column is a blend of base and tuned network.
        families: names of the families whose models images come from.
    """
    used = {_ALSO.get(name, name) for name in rewards} | {features.partition(",")[0].partition("=")[0], "vendi"}
    used |= {name for name, is_used in (("draft", trained), ("aig", annealed)) if is_used} | {*families}
    return "\n\n".join(_entry(*fields) for name, fields in _ENTRIES.items() if name in used) + "\n"


def _entry(key: str, title: str, authors: str, year: str, eprint: str) -> str:
    fields = {"title": f"{{{title}}}", "author": authors, "year": year, "eprint": eprint, "archivePrefix": "arXiv"}
    lines = [f"  {name:<13} = {{{value}}}" for name, value in fields.items()]
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"

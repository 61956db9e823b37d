"""Families that the plug-in for vLLM serves, by the names of vLLM's classes. vLLM itself is not imported."""

CLASSES: dict[str, str] = {
    "llava": "DymuLlavaForConditionalGeneration",
    "internvl": "DymuInternVLForConditionalGeneration",
    "qwen2_5_vl": "DymuQwen2_5_VLForConditionalGeneration",
}
"""By model type, the class of `dymu.serving.vllm.model`."""
LANGUAGE_MODELS: dict[str, str] = {"qwen2_5_vl_text": "Qwen2ForCausalLM"}
"""By model type, the class of vLLM that computes a language model, where transformers has none for it alone."""

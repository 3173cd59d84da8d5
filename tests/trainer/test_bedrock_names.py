"""Bedrock's list of architectures against transformers' own names, which need torch."""

from transformers.models.auto import modeling_auto

from pipeline.validation.bedrock import ARCHITECTURES


def test_transformers_knows_every_name():
    known = {
        name
        for names in (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        )
        for name in names.values()
    }
    assert set(ARCHITECTURES) <= known

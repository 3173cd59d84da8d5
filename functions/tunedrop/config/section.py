"""What all sections of the run config have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class NoBoolNumbers(BaseModel):
    """A section that takes no true or false for a number."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number: pydantic reads them as 1 and 0."""
        kinds = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kinds in (int, float, int | None, float | None):
            raise ValueError("must be a number")
        return value


class Section(NoBoolNumbers):
    """A section whose unknown keys are errors, and whose values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

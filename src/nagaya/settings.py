"""Settings of a server: ``nagaya.toml``, overridden by environment variables (``NAGAYA_OVERCOMMIT__MEMORY=1.2``)."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from nagaya.errors import InvalidInput
from nagaya.host import Paths
from nagaya.model.node import Ratios


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Overcommit(_Section):
    """How far resources may be promised beyond what the host has; see model/node.py."""

    memory: Annotated[float, Field(gt=0, le=10)] = 1.0
    cpu: Annotated[float, Field(gt=0, le=1000)] = 16.0
    disk: Annotated[float, Field(gt=0, le=1000)] = 4.0
    memory_reserve_mib: Annotated[int, Field(ge=0)] = 512
    disk_reserve_mib: Annotated[int, Field(ge=0)] = 1024


class Jail(_Section):
    """The range of user ids that machines run under when Nagaya is root."""

    # Above the ranges that systemd and the subordinate-id tools hand out, below 2**31.
    uid_base: Annotated[int, Field(ge=65536, lt=2**31 - 65536)] = 1_900_000_000
    uid_count: Annotated[int, Field(ge=16, le=65536)] = 65536


class Trial(_Section):
    """How long an accelerator's trial boot may take."""

    silence_s: Annotated[float, Field(gt=0)] = 20.0
    deadline_s: Annotated[float, Field(gt=0)] = 120.0


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="NAGAYA_", env_nested_delimiter="__", extra="ignore", frozen=True)

    overcommit: Overcommit = Overcommit()
    jail: Jail = Jail()
    trial: Trial = Trial()

    @classmethod
    def load(cls, paths: Paths) -> Settings:
        """Read the configuration of this installation. Raises InvalidInput naming the file and the field."""
        file = paths.config

        class Located(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file))

        try:
            loaded: Settings = Located()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidInput(
                f"The configuration is wrong at {where}: {first['msg']} (given: {first['input']!r})",
                hint=f"Mend {file}, or the environment variable NAGAYA_{where.upper().replace('.', '__')}",
            ) from error
        except ValueError as error:
            raise InvalidInput(f"{file} cannot be read: {error}", hint="It must be valid TOML") from error
        return loaded

    @property
    def ratios(self) -> Ratios:
        return Ratios(**self.overcommit.model_dump())

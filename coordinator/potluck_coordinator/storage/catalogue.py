"""The operator's models and wishes, as rows.

Decides that a model which is taken away takes the wish for it along. It must not know what a wish leads to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

import msgspec
from sqlmodel import Session, col, select

from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment, ServiceTier
from potluck_coordinator.storage.tables import CatalogueModelRow, DeploymentRow
from potluck_protocol.values import ModelId


class Origin(StrEnum):
    """Who offers a model."""

    BUILT_IN = "built_in"
    FILE = "file"
    """The operator's catalogue file, which is read at each start."""
    ADDED = "added"
    """The operator, by `potluck models add`."""


class CatalogueRepository:
    """The `catalogue_model` and `deployment` tables."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, entries: Iterable[CatalogueEntry], origin: Origin) -> None:
        """Adds each entry, or replaces the one of the same model."""
        for entry in entries:
            text = msgspec.json.encode(entry).decode()
            self._session.merge(CatalogueModelRow(model_id=entry.model_id, entry=text, origin=origin))
        self._session.flush()

    def entries(self) -> Mapping[ModelId, CatalogueEntry]:
        rows = self._session.exec(select(CatalogueModelRow).order_by(col(CatalogueModelRow.model_id)))
        return {ModelId(row.model_id): msgspec.json.decode(row.entry, type=CatalogueEntry) for row in rows}

    def origins(self) -> Mapping[ModelId, Origin]:
        """Whose each entry is."""
        rows = self._session.exec(select(CatalogueModelRow.model_id, CatalogueModelRow.origin))
        return {ModelId(model_id): Origin(origin) for model_id, origin in rows}

    def remove(self, model_id: ModelId) -> None:
        """Takes the model and the wish for it away."""
        self.withdraw(model_id)
        row = self._session.get(CatalogueModelRow, model_id)
        if row is not None:
            self._session.delete(row)
            self._session.flush()

    def deploy(self, deployment: Deployment) -> None:
        """Adds the wish, or replaces the one for the same model, which must be in the catalogue."""
        self._session.merge(DeploymentRow(model_id=deployment.model_id, replica_count=deployment.replica_count, tier=deployment.tier))
        self._session.flush()

    def withdraw(self, model_id: ModelId) -> bool:
        """Takes the wish away; False where there was none."""
        row = self._session.get(DeploymentRow, model_id)
        if row is None:
            return False
        self._session.delete(row)
        self._session.flush()
        return True

    def deployments(self) -> tuple[Deployment, ...]:
        rows = self._session.exec(select(DeploymentRow).order_by(col(DeploymentRow.model_id)))
        return tuple(Deployment(ModelId(row.model_id), row.replica_count, ServiceTier(row.tier)) for row in rows)

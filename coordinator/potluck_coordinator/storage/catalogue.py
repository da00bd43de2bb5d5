"""The operator's models and wishes, as rows.

Decides that a model which is taken away takes the wish for it along. It must not know what a wish leads to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from sqlmodel import Session, col, select

from potluck_coordinator.domain.catalogue import CatalogueEntry, Deployment
from potluck_coordinator.storage.tables import CatalogueModelRow, DeploymentRow
from potluck_protocol.values import ModelId


class CatalogueRepository:
    """The `catalogue_model` and `deployment` tables."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def put(self, entries: Iterable[CatalogueEntry]) -> None:
        """Adds each entry, or replaces the one of the same model."""
        for entry in entries:
            self._session.merge(CatalogueModelRow(model_id=entry.model_id, entry=msgspec.json.encode(entry).decode()))
        self._session.flush()

    def entries(self) -> Mapping[ModelId, CatalogueEntry]:
        rows = self._session.exec(select(CatalogueModelRow).order_by(col(CatalogueModelRow.model_id)))
        return {ModelId(row.model_id): msgspec.json.decode(row.entry, type=CatalogueEntry) for row in rows}

    def remove(self, model_id: ModelId) -> None:
        """Takes the model and the wish for it away."""
        self.withdraw(model_id)
        row = self._session.get(CatalogueModelRow, model_id)
        if row is not None:
            self._session.delete(row)
            self._session.flush()

    def deploy(self, deployment: Deployment) -> None:
        """Adds the wish, or replaces the one for the same model, which must be in the catalogue."""
        self._session.merge(DeploymentRow(model_id=deployment.model_id, replica_count=deployment.replica_count))
        self._session.flush()

    def withdraw(self, model_id: ModelId) -> None:
        row = self._session.get(DeploymentRow, model_id)
        if row is not None:
            self._session.delete(row)
            self._session.flush()

    def deployments(self) -> tuple[Deployment, ...]:
        rows = self._session.exec(select(DeploymentRow).order_by(col(DeploymentRow.model_id)))
        return tuple(Deployment(ModelId(row.model_id), row.replica_count) for row in rows)

"""Which replica gets a request: a session's own, whose prefix cache has what came before; without session, a less busy
one.

Runs in Ray's proxies, on their event loop. A session is named by the header `x-session-id` (the variable
RAY_SERVE_SESSION_ID_HEADER_KEY names another header).
"""

from collections.abc import Mapping

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import LocalityMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

from deploy.ray.sessions import has_room, home


class SessionRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]
    """Sessions by hash with bounded load, the rest by the power of two choices.

    Without Ray's FIFOMixin: a replica that was chosen for one request must not go to the one that came first.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas to try, in this order; of two in one place, the less busy one."""
        others: list[list[RunningReplica]] = await PowerOfTwoChoicesRequestRouter.choose_replicas(
            self, candidate_replicas, pending_request
        )
        session = pending_request.metadata.session_id if pending_request else ""
        if not session or not candidate_replicas:
            return others
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        chosen = home(session, known)
        if not has_room(chosen, self._requests(known)):
            return others
        return [[known[chosen]], *others]

    def _requests(self, replicas: Mapping[str, RunningReplica]) -> dict[str, int]:
        """How many requests each has, as far as is known here."""
        counts = {name: self.replica_queue_len_cache.get(one.replica_id) for name, one in replicas.items()}
        return {name: count for name, count in counts.items() if count is not None}

"""Gateways on a cluster of three NATS servers of which one is in trouble."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import httpx2
import nats.errors
import nats.js.errors

from shared.broker.connection import RETRY_DELAY_S, Broker, connected
from shared.broker.results import find_result, store_result
from shared.broker.streams import Topology
from shared.broker.topology import ensure_topology
from shared.config import BrokerSettings
from shared.errors import BrokerUnavailable
from shared.job_ids import new_job_id
from shared.timestamps import timestamp
from shared.wire import subjects
from shared.wire.results import Cancelled, Result
from tests.chaos.cluster import Cluster
from tests.chaos.parts import Gateway, Node
from tests.support.processes import PATIENCE_S

JOB = {"model": "idle", "prompt": "hi", "max_tokens": 2}


async def test_a_gateway_that_starts_before_all_nodes_waits_for_them(tmp_path: Path) -> None:
    """It says why it cannot serve, again when the reason changes, and waits for the third node
    instead of ending."""
    # One that was there and died counts for a while: it must never have been there.
    first, second, third = nodes = Cluster(tmp_path).nodes
    gateway = _gateway_at(first, tmp_path)

    async def until_not_prepared(why: str) -> None:
        while not any(why in event["error"] for event in gateway.events("broker_not_prepared")):
            await asyncio.sleep(0.05)

    try:
        async with asyncio.timeout(60):
            first.launch()
            gateway.launch()
            await until_not_prepared("")
            second.launch()
            await until_not_prepared("too few nodes")
        third.launch()
        # Whichever dies meanwhile is an error, with the end of its log.
        await asyncio.gather(third.until_ready(), gateway.until_ready())
    finally:
        for part in (gateway, *nodes):
            part.kill()


@asynccontextmanager
async def gateway_at(node: Node, folder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a gateway that knows only this node; nobody serves its model."""
    gateway = _gateway_at(node, folder)
    gateway.launch()
    try:
        await gateway.until_ready()
        async with httpx2.AsyncClient(base_url=gateway.url, timeout=60) as http:
            yield http
    finally:
        gateway.kill()


async def test_a_submit_waits_out_an_election(tmp_path: Path) -> None:
    """kill -9 of the node that leads the queue: the next submit takes longer and is accepted."""
    async with Cluster(tmp_path) as cluster, gateway_at(cluster.nodes[0], tmp_path) as http:
        assert (await http.post("/jobs", json=JOB)).status_code == 202
        while (leader := await cluster.leader(subjects.REQUESTS)) is cluster.nodes[0]:
            await cluster.broker.nc.request(
                f"$JS.API.STREAM.LEADER.STEPDOWN.{subjects.REQUESTS}", b"", timeout=5
            )
            await asyncio.sleep(0.5)
        leader.kill()
        answers = await asyncio.gather(*(http.post("/jobs", json=JOB) for _ in range(10)))
        assert [answer.status_code for answer in answers] == [202] * 10


async def test_a_job_that_was_accepted_is_never_unknown(tmp_path: Path) -> None:
    """A node was frozen while jobs were accepted: its gateway finds them before it catches up."""
    async with (
        Cluster(tmp_path) as cluster,
        gateway_at(cluster.nodes[0], tmp_path) as lagging,
        gateway_at(cluster.nodes[1], tmp_path) as other,
    ):
        for _ in range(6):
            cluster.nodes[0].freeze()
            try:
                accepted = await asyncio.gather(*(other.post("/jobs", json=JOB) for _ in range(50)))
                ids = [answer.json()["id"] for answer in accepted]
                asked = [asyncio.create_task(lagging.get(f"/status/{job_id}")) for job_id in ids]
                await asyncio.sleep(0.2)
            finally:
                cluster.nodes[0].thaw()
            for job_id in ids:
                asked.append(asyncio.create_task(lagging.get(f"/status/{job_id}")))
                await asyncio.sleep(0.002)
            answers = [await answer for answer in asked]
            assert {answer.status_code for answer in answers} <= {200, 503}


async def test_jobs_are_listed_alike_after_a_node_was_killed(tmp_path: Path) -> None:
    """By gateways at two other nodes, with the copies of their requests, which are on all nodes."""
    async with (
        Cluster(tmp_path) as cluster,
        gateway_at(cluster.nodes[0], tmp_path) as one,
        gateway_at(cluster.nodes[1], tmp_path) as other,
    ):
        ids = [(await one.post("/jobs", json=JOB)).json()["id"] for _ in range(10)]
        for job_id in ids[:5]:
            assert (await other.delete(f"/jobs/{job_id}")).status_code == 200
        kept = await cluster.broker.js.stream_info(subjects.KEPT)
        assert kept.config.num_replicas == 3
        cluster.nodes[2].kill()
        ids += [(await other.post("/jobs", json=JOB)).json()["id"] for _ in range(5)]
        expected = {job_id: "REVOKED" if job_id in ids[:5] else "PENDING" for job_id in ids}
        for http in (one, other):
            await until_listed(http, expected)
            async with asyncio.timeout(PATIENCE_S):
                while (shown := await http.get(f"/jobs/{ids[0]}")).status_code != 200:
                    await asyncio.sleep(0.2)  # an election
            job = shown.json()
            assert (job["request"]["prompt"], job["request_from"]) == (JOB["prompt"], "kept")


async def test_no_job_waits_for_the_copies_of_requests(tmp_path: Path) -> None:
    """A node is down, so their stream cannot be created, and somebody has removed it: gateways
    serve, and create it when the node is back."""
    async with Cluster(tmp_path) as cluster:
        async with gateway_at(cluster.nodes[0], tmp_path) as http:
            cluster.nodes[2].kill()
            await removed(cluster, subjects.KEPT)
            # The elections take a moment; then it goes on, though it has seen what is missing.
            served = 0
            async with asyncio.timeout(PATIENCE_S):
                while served < 10:
                    answers = await http.post("/jobs", json=JOB), await http.get("/readyz")
                    is_served = [answer.status_code for answer in answers] == [202, 200]
                    served = served + 1 if is_served else 0
                    await asyncio.sleep(0.3)
        async with gateway_at(cluster.nodes[1], tmp_path) as http:
            job_id = (await http.post("/jobs", json=JOB)).json()["id"]
            assert (await http.get(f"/jobs/{job_id}")).json()["request_from"] == "queue"
            cluster.nodes[2].launch()
            async with asyncio.timeout(PATIENCE_S):
                while not await _are_kept(http):
                    await asyncio.sleep(0.5)


async def removed(cluster: Cluster, stream: str) -> None:
    """Delete ``stream``, also during elections."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await cluster.broker.js.delete_stream(stream)
            except nats.js.errors.NotFoundError:
                return
            except (nats.errors.Error, nats.js.errors.Error):
                await asyncio.sleep(0.2)


async def _are_kept(http: httpx2.AsyncClient) -> bool:
    answer = await http.post("/jobs", json=JOB)
    if answer.status_code != 202:
        return False
    job_id = answer.json()["id"]
    await http.delete(f"/jobs/{job_id}")
    answer = await http.get(f"/jobs/{job_id}")
    return answer.status_code == 200 and answer.json()["request_from"] == "kept"


async def until_listed(http: httpx2.AsyncClient, expected: dict[str, str]) -> None:
    """A replica may lag behind its leader for a moment."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            answer = await http.get("/jobs")
            if answer.status_code == 200:
                found = {job["id"]: job["state"] for job in answer.json()["jobs"]}
                if found == expected:
                    return
            await asyncio.sleep(0.2)


async def test_gateways_that_start_at_the_same_moment_all_become_ready(tmp_path: Path) -> None:
    """On a cluster that holds nothing yet, two at each node: all come to serve."""
    async with Cluster(tmp_path) as cluster, AsyncExitStack() as stack:
        urls = [node.url for node in cluster.nodes] * 2
        brokers = [
            await stack.enter_async_context(connected(BrokerSettings(url=url), "test"))
            for url in urls
        ]
        await asyncio.gather(*map(_prepare, brokers))


async def test_a_gateway_that_stops_during_an_election_ends_in_time(tmp_path: Path) -> None:
    """A caller that still waits is asked to use another one, with 503, in time; or is answered,
    where one node can do it."""
    async with Cluster(tmp_path) as cluster:
        gateway = _gateway_at(cluster.nodes[0], tmp_path)
        gateway.launch()
        try:
            await gateway.until_ready()
            async with httpx2.AsyncClient(base_url=gateway.url, timeout=60) as http:
                job_id = (await http.post("/jobs", json=JOB)).json()["id"]
                for node in cluster.nodes[1:]:
                    node.freeze()
                waiting = [http.post("/jobs", json=JOB), http.delete(f"/jobs/{job_id}")]
                paths = ("/queue", "/inferers", "/dead", "/v1/models", f"/jobs/{job_id}/events")
                waiting += [http.get(path) for path in paths for _ in range(4)]
                asked = [asyncio.create_task(call) for call in waiting]
                await asyncio.sleep(0.5)
                assert await gateway.terminate() == 0
                printed = [(await answer).status_code for answer in asked]
                assert printed[:2] == [503] * 2
                assert set(printed) <= {200, 503}
        finally:
            gateway.kill()
        assert "Traceback" not in gateway.logs[0].read_text()


async def test_many_results_at_the_same_moment_all_get_the_stored_one(tmp_path: Path) -> None:
    """Each attempt gets the one that is stored, also while the nodes still agree on it."""
    async with Cluster(tmp_path) as cluster:
        await _prepare(cluster.broker)
        for _ in range(20):
            job_id = new_job_id()
            results = [_cancelled(job_id, attempt) for attempt in range(10)]
            stored = await asyncio.gather(*(_store(cluster.broker, result) for result in results))
            assert stored == [await find_result(cluster.broker, job_id, from_leader=True)] * 10


def _gateway_at(node: Node, folder: Path) -> Gateway:
    return Gateway(f"gateway-at-{node.name}", folder, node.url, 3, GATEWAY_MODELS="idle")


async def test_a_publish_that_is_repeated_too_early_is_stored_once(tmp_path: Path) -> None:
    """While the nodes still agree on the first try: stored once, and all learn where."""
    async with Cluster(tmp_path) as cluster:
        await _prepare(cluster.broker)
        for number in range(20):
            subject = subjects.state_events("tiny", new_job_id())
            headers = {subjects.HEADER_MSG_ID: f"{number}"}
            tries = [cluster.broker.publish_stored(subject, b"", headers, 10) for _ in range(10)]
            acks = await asyncio.gather(*tries)
            assert len({ack.seq for ack in acks}) == 1


async def _prepare(broker: Broker) -> None:
    """Try until every node is seen, as gateways do: in its first seconds a cluster misses some."""
    while True:
        with suppress(BrokerUnavailable):
            await ensure_topology(broker, Topology(replicas=3), ["a", "b"])
            return
        await asyncio.sleep(RETRY_DELAY_S)


async def _store(broker: Broker, result: Result) -> Result:
    """As an inferer does."""
    while True:
        with suppress(BrokerUnavailable):
            return await store_result(broker, result, patience_s=5)


def _cancelled(job_id: str, attempt: int) -> Cancelled:
    return Cancelled(
        id=job_id,
        model="idle",
        attempt=attempt,
        queued_at=timestamp(),
        finished_at=timestamp(),
        code="cancelled",
        message="",
    )

"""Batches, reruns, workflows, traces, and finding executions again."""

import asyncio

import pytest

from executions import operations
from executions.models import Execution, Quota
from executions.states import Unit, Window

pytestmark = pytest.mark.django_db
RUN = "/api/v1/executions"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


async def ended(execution_id: str) -> Execution:
    execution = await Execution.objects.aget(pk=execution_id)
    await operations.wait(execution, 10)
    return execution


async def test_a_batch_is_admitted_whole_and_runs(call):
    asked = {"executions": [{"code": f"#= {n}", "workflow": "w", "step": str(n % 2)} for n in range(5)]}
    answer = await call("POST", f"{RUN}/batch", asked)

    assert answer.status_code == 202
    ids = [one["id"] for one in answer.json()["results"]]
    assert [(await ended(one)).state for one in ids] == ["succeeded"] * 5
    workflow = (await call("GET", "/api/v1/workflows/w")).json()
    assert (workflow["executions"], workflow["open"], workflow["states"]) == (5, 0, {"succeeded": 5})
    assert [one["id"] for one in workflow["timeline"]] == ids
    assert [(step["step"], step["executions"]) for step in workflow["steps"]] == [("0", 3), ("1", 2)]
    costs = [execution.cost_nano_usd or 0 async for execution in Execution.objects.all()]
    assert workflow["cost_nano_usd"] == sum(costs)
    assert workflow["last_at"]


async def test_a_batch_without_room_for_one_is_refused_whole(call, team):
    await Quota.objects.acreate(team=team, unit=Unit.EXECUTIONS, window=Window.HOUR, limit=2)
    answer = await call("POST", f"{RUN}/batch", {"executions": [{"code": "#= 1"}] * 3})

    assert (answer.status_code, answer.json()["code"], answer.json()["index"]) == (429, "quota_exceeded", 2)
    assert not await Execution.objects.aexists()
    assert (await call("POST", f"{RUN}/batch", {"executions": [{"code": "#= 1"}] * 2})).status_code == 202


@pytest.mark.parametrize(
    "executions", [[], [{"code": "#= 1"}] * 101, [{}], [{"code": "x"}, {"code": "x", "language": "cobol"}], "x"]
)
async def test_a_batch_that_is_none_is_refused(call, executions):
    answer = await call("POST", f"{RUN}/batch", {"executions": executions})

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid")
    assert not await Execution.objects.aexists()


async def test_a_batch_keeps_to_the_most_that_each_may_cost(call):
    answer = await call("POST", f"{RUN}/batch", {"executions": [{"code": "#= 1"}, {"code": "#= 1", "max_cost_usd": 0}]})
    priced = await call("POST", f"{RUN}/batch", {"executions": [{"code": "#= 1", "dry_run": True}]})

    assert (answer.status_code, answer.json()["index"]) == (402, 1)
    assert (priced.status_code, priced.json()["field"]) == (400, "dry_run")
    assert not await Execution.objects.aexists()


async def test_a_rerun_reaches_no_more_of_the_network_than_the_first(call, agent):
    agent.network_allow = ["*"]
    await agent.asave()
    first = (await call("POST", RUN, {"code": "#@ data.example:443", "network": [], "timeout_seconds": 7})).json()
    again = (await call("POST", f"{RUN}/{first['id']}/rerun", {}, Prefer="wait=10")).json()

    assert [one["verdict"] for one in again["egress"]] == [one["verdict"] for one in first["egress"]]
    assert again["timeout_seconds"] == 7
    assert (await Execution.objects.select_related("sandbox").aget(pk=again["id"])).sandbox.network_allow == []


async def test_a_batch_under_one_idempotency_key_runs_once(call):
    key = {"Idempotency-Key": "b1"}
    two = {"executions": [{"code": "#= 1"}, {"code": "#= 2"}]}
    first = await call("POST", f"{RUN}/batch", two, **key)
    again = await call("POST", f"{RUN}/batch", two, **key)
    other = await call("POST", f"{RUN}/batch", {"executions": [{"code": "#= 1"}]}, **key)
    longer = await call("POST", f"{RUN}/batch", {"executions": [*two["executions"], {"code": "#= 3"}]}, **key)

    assert [one["id"] for one in first.json()["results"]] == [one["id"] for one in again.json()["results"]]
    assert (other.status_code, longer.status_code) == (422, 422)
    assert await Execution.objects.acount() == 2


async def test_a_rerun_goes_elsewhere_with_other_limits_as_a_child_of_the_first(call):
    asked = {"code": "#> hi", "workflow": "w", "env": {"A": "b"}, "files": {"a.txt": "YQ=="}, "metadata": {"n": "1"}}
    first = (await call("POST", RUN, asked)).json()

    answer = await call(
        "POST", f"{RUN}/{first['id']}/rerun", {"route": ["second"], "limits": {"results": 1}}, Prefer="wait=10"
    )

    again = answer.json()
    assert answer.status_code == 201
    assert (again["parent"], again["backend"], again["limits"]) == (first["id"], "second", {"results": 1})
    assert (again["workflow"], again["metadata"], again["logs"]["stdout"]) == ("w", {"n": "1"}, "hi\n")
    children = (await call("GET", f"{RUN}?parent={first['id']}")).json()["results"]
    assert [one["id"] for one in children] == [again["id"]]


async def test_a_script_that_comes_with_the_request_runs_with_its_arguments(call):
    asked = {"script_path": "run.sh", "args": ["a b"], "language": "bash", "files": {"/home/user/run.sh": "Iw=="}}
    body = (await call("POST", RUN, asked)).json()
    again = await call("POST", f"{RUN}/{body['id']}/rerun", {}, Prefer="wait=10")

    assert (body["code"], body["exit_code"]) == ("bash ./run.sh 'a b'", 0)
    assert (again.json()["code"], again.json()["exit_code"]) == (body["code"], 0)


async def test_a_workflow_is_cancelled_with_all_that_is_open(call):
    running = (await call("POST", RUN, {"code": "#~ 30", "workflow": "a/b"}, Prefer="respond-async")).json()
    await call("POST", RUN, {"code": "#= 1", "workflow": "a/b"})

    answer = await call("POST", "/api/v1/workflows/a/b/cancel", {"reason": "enough"})

    assert (answer.status_code, answer.json()) == (202, {"id": "a/b", "cancelled": 1})
    assert (await ended(running["id"])).state == "cancelled"
    assert (await call("DELETE", "/api/v1/workflows/a/b")).json()["cancelled"] == 0
    assert (await call("DELETE", "/api/v1/workflows/none")).status_code == 404


async def test_a_trace_is_kept_with_what_runs_and_answered(call):
    parent = f"00-{TRACE}-00f067aa0ba902b7-01"
    answer = await call("POST", RUN, {"code": "#= 1"}, traceparent=parent)

    assert answer.json()["trace_id"] == TRACE
    version, trace, span, flags = answer["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != "00f067aa0ba902b7"
    assert [one["id"] for one in (await call("GET", f"{RUN}?trace_id={TRACE}")).json()["results"]] == [
        answer.json()["id"]
    ]


@pytest.mark.parametrize("parent", ["", "nonsense", f"ff-{TRACE}-00f067aa0ba902b7-01", f"00-{'0' * 32}-00f067aa0ba902b7-01",
                                    f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-00f067aa0ba902b7-01-more"])  # fmt: skip
async def test_a_trace_that_is_none_is_passed_over(call, parent):
    answer = await call("POST", RUN, {"code": "#= 1"}, traceparent=parent)

    assert (answer.status_code, answer.json()["trace_id"], "traceparent" in answer) == (201, "", False)


async def test_executions_are_found_by_text_labels_and_metadata(call):
    await call("POST", RUN, {"code": "#= 1", "metadata": {"customer": "a", "x__contains": "y"}, "step": "load"})
    await call("POST", RUN, {"code": "#! ValueError: teapot", "metadata": {"customer": "b"}})

    async def found(query: str) -> list[str]:
        answer = await call("GET", f"{RUN}?{query}")
        assert answer.status_code == 200, answer.content
        return [one["code"] for one in answer.json()["results"]]

    assert await found("metadata.customer=a") == ["#= 1"]
    assert await found("metadata.customer=a&metadata.x__contains=y") == ["#= 1"]
    assert await found("metadata.x__contains=nothing") == []
    assert await found("metadata.nothing=a") == []
    assert await found("q=TEAPOT") == ["#! ValueError: teapot"]
    assert await found("step=load") == ["#= 1"]
    assert await found("state=failed") == ["#! ValueError: teapot"]
    refused = await call("GET", f"{RUN}?colour=red")
    assert (refused.status_code, refused.json()["field"]) == (400, "colour")


async def test_a_waiting_caller_who_leaves_ends_the_run_only_where_it_said_so(call):
    async def left_while_running(**fields) -> Execution:
        waiting = asyncio.create_task(call("POST", RUN, {"code": "#~ 30", **fields}))
        while (execution := await Execution.objects.filter(ended_at=None).afirst()) is None:
            await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait({waiting})
        return execution

    cancelled = await left_while_running(cancel_on_disconnect=True)
    assert (await ended(cancelled.pk)).state == "cancelled"
    kept = await left_while_running()
    assert kept.cancel_requested_at is None
    assert await operations.cancel(execution=await Execution.objects.aget(pk=kept.pk))

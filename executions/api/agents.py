"""/api/v1/agents: the programs of the team, with what each may do and where."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse

from executions.api.auth import caller_of
from executions.api.executions import answer, body_of
from executions.api.once import written
from executions.api.operation import Many, operation
from executions.api.pages import ROWS_MOST, known_query, listed
from executions.hop import rows
from executions.keys import Caller
from executions.operations import access
from executions.operations.answers import Kept
from executions.serializers import parse
from executions.serializers.access import AgentChange, AgentRequest, AgentShape, agent_shape
from executions.states import Scope


@operation("List the agents of the team", gives={200: Many(AgentShape)})
async def every(request: HttpRequest) -> HttpResponse:
    def look() -> list[AgentShape]:
        caller = caller_of(request)
        caller.needs(Scope.READ)
        known_query(request)
        return [agent_shape(agent) for agent in access.agents_of(caller).order_by("name")[:ROWS_MOST]]

    return listed(await rows(look))


@operation("Make an agent", body=AgentRequest, gives={201: AgentShape}, fails=(409, 422))
async def create(request: HttpRequest) -> HttpResponse:
    def make(caller: Caller) -> tuple[Kept, Kept]:
        made = access.make_agent(caller=caller, asked=parse(AgentRequest, body_of(request)))
        said = Kept(201, agent_shape(made).model_dump_json())
        return said, said

    return await written(request, make)


@operation("Look at an agent", gives={200: AgentShape})
async def look(request: HttpRequest, agent_id: str) -> HttpResponse:
    def find() -> AgentShape:
        caller = caller_of(request)
        caller.needs(Scope.READ)
        return agent_shape(access.find_agent(caller, agent_id))

    return answer(await rows(find))


@operation("Change an agent", body=AgentChange, gives={200: AgentShape}, fails=(409, 422))
async def change(request: HttpRequest, agent_id: str) -> HttpResponse:
    def do(caller: Caller) -> tuple[Kept, Kept]:
        asked = parse(AgentChange, body_of(request))
        changed = access.change_agent(caller=caller, agent_id=agent_id, asked=asked)
        said = Kept(200, agent_shape(changed).model_dump_json())
        return said, said

    return await written(request, do)


@operation("Switch an agent off", gives={204: None})
async def switch_off(request: HttpRequest, agent_id: str) -> HttpResponse:
    await rows(lambda: access.switch_off_agent(caller=caller_of(request), agent_id=agent_id))
    return HttpResponse(status=204)

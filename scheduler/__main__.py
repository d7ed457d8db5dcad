from tpworker.ipc.child import SchedulerBoot, run_child
from tpworker.scheduler.main import scheduler_main

run_child(SchedulerBoot, scheduler_main)

from tpworker.ipc.child import SchedulerBoot, run_child
from tpworker.scheduler.process import scheduler_main

run_child(SchedulerBoot, scheduler_main)

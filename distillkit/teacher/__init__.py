"""Teachers: one type, live or captured, and how a configuration becomes one."""

from distillkit.teacher.teacher import SignalRequest as SignalRequest
from distillkit.teacher.teacher import Teacher as Teacher
from distillkit.teacher.teacher import TeacherSignal as TeacherSignal

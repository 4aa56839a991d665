# nbgrader reads this file when it is run in this folder. See the chapter "Teaching with this course".
from llmcourse.practice import classroom

c = get_config()  # noqa: F821 - nbgrader defines it

c.CourseDirectory.course_id = "llmcourse"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "exercises"
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", ".llmcourse-progress*"]

# A release leaves out the cells that only the checker needs.
from nbgrader.converters import Autograde, GenerateAssignment  # noqa: E402
from nbgrader.preprocessors import Execute  # noqa: E402

c.GenerateAssignment.preprocessors = [classroom.ForLearners, *GenerateAssignment.preprocessors.default_args[0]]

# Submissions are graded in child processes, as `llmcourse check` does it; a renamed file is recognized, a deleted test
# cell put back.
c.Autograde.autograde_preprocessors = [
    classroom.GradeApart if p is Execute else p for p in Autograde.autograde_preprocessors.default_args[0]
]
c.Autograde.pre_convert_hook = "llmcourse.practice.classroom.rename_submissions"
c.OverwriteCells.add_missing_cells = True

"""Python loads this by itself in every process that has this folder on its PYTHONPATH: the service under test, its worker and
its trainer."""

import crash_points

crash_points.install()

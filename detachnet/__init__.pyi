"""The public names, each written once: this file is read when the package is imported, too."""

from .checkpoint.loading import load as load
from .checkpoint.saving import save as save
from .data.datasets import load_data as load_data
from .deploy.deadline import DeadlineRunner as DeadlineRunner
from .deploy.export import export as export
from .deploy.family import Family as Family
from .deploy.manifest import Manifest as Manifest, read_manifest as read_manifest
from .deploy.measurement import Measurement as Measurement
from .deploy.opening import open_graph as open_graph
from .deploy.profile import Profile as Profile, profile as profile
from .deploy.segments import measure_segments as measure_segments
from .errors import (
    BudgetError as BudgetError,
    CheckpointError as CheckpointError,
    CutError as CutError,
    DataError as DataError,
    DetachNetError as DetachNetError,
    ExportError as ExportError,
    LateError as LateError,
    MeasurementError as MeasurementError,
    ModelError as ModelError,
    RecipeError as RecipeError,
    StepDownError as StepDownError,
    TraceError as TraceError,
    TrainingError as TrainingError,
    WidthError as WidthError,
)
from .evaluation import evaluate as evaluate
from .facts import DataInfo as DataInfo, Facts as Facts
from .losses import MultiModelLoss as MultiModelLoss
from .memory import keep_freed as keep_freed
from .report.publishing import push_to_hub as push_to_hub
from .selection.front import Front as Front
from .selection.searching import search as search
from .surgery.cuts import CutPoint as CutPoint, find_cuts as find_cuts
from .surgery.detachable import DetachableNet as DetachableNet
from .surgery.importance import span_importance as span_importance
from .surgery.making import make_detachable as make_detachable
from .surgery.plan import DetachPlan as DetachPlan
from .surgery.recalibration import recalibrate as recalibrate
from .surgery.routes import SubModel as SubModel
from .surgery.spans import SpanPoint as SpanPoint, find_spans as find_spans
from .surgery.stepdown import Stem as Stem
from .surgery.widths.groups import WidthGroup as WidthGroup, Widths as Widths, find_widths as find_widths
from .training.recipe import Recipe as Recipe, load_recipe as load_recipe
from .training.trainer import train as train
from .zoo import create_model as create_model

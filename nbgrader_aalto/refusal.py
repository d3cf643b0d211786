"""What stands where nothing safe can stand: a preprocessor that refuses, and says why."""

from typing import Any

from nbconvert.preprocessors import Preprocessor
from traitlets import Bool, Unicode

from nbgrader_aalto.configure import ConfigurationError


class RefuseToRun(Preprocessor):
    """Stands where nothing safe can stand: whatever is autograded with it fails, and says why.

    An exception in nbgrader_config.py would not do: traitlets logs it, forgets the whole file and goes on with
    stock nbgrader, without a sandbox.
    """

    reason = Unicode("the configuration is not safe").tag(config=True)

    enabled = Bool(True)

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        """Raises `ConfigurationError`, always."""
        raise ConfigurationError(self.reason)

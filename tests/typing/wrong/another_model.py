from bigram.model import BigramConfig, BigramModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule

from bridge.dist import DistributedModelBuilder


class Builder(DistributedModelBuilder[BigramModel, BigramConfig]):
    def build_model(  # E: Return type "MegatronModule" of "build_model" incompatible with return type "BigramModel" in supertype "bridge.builders.builder.ModelBuilder"  [override]
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MegatronModule:
        return MegatronModule(self._model_config.transformer)

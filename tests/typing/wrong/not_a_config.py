from bigram.model import BigramModel

from bridge.dist import DistributedModelBuilder


class Builder(DistributedModelBuilder[BigramModel, dict[str, int]]):  # E: Type argument "dict[str, int]" of "DistributedModelBuilder" must be a subtype of "ModelConfig"  [type-var]
    pass

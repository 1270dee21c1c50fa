"""The sharding table against every parameter of the paper's models, and the activation constraints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from tests.tiny import abstract_projector
from vr_jax import sharding
from vr_jax.model import registry
from vr_jax.model.config import VlmConfig
from vr_jax.model.decoders.transformer import TransformerConfig
from vr_jax.model.encoders.siglip import SiglipConfig
from vr_jax.model.projectors.mlp import MlpConfig
from vr_jax.model.refusion.deepstack import DeepStackConfig
from vr_jax.model.refusion.sva import SvaConfig
from vr_jax.model.refusion.vision_remember import VisionRememberConfig
from vr_jax.model.vlm import abstract_model
from vr_jax.plan.hlo_costs import program_costs

QWEN2 = {
    "0.5B": TransformerConfig(),
    "1.5B": TransformerConfig(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12),
    "7B": TransformerConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        tie_word_embeddings=False,
    ),
}
# (replica, fsdp, tensor): the three, one host of 8, a v5e-64 and a v5e-256.
MESHES = [(1, 8, 1), (1, 4, 2), (2, 4, 1), (1, 1, 2), (1, 64, 1), (2, 64, 2), (8, 32, 1)]


def abstract_mesh(shape):
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def with_vision_remember(text, **refusion):
    return abstract_model(VlmConfig(decoder=text, refusion=VisionRememberConfig(**refusion)))


@pytest.fixture(scope="module", params=QWEN2)
def model(request):
    return with_vision_remember(QWEN2[request.param])


def test_each_parameter_matches_exactly_one_rule_and_every_cut_axis_divides(model):
    leaves = jax.tree_util.tree_leaves_with_path(model)
    assert len(leaves) > 80
    for key_path, leaf in leaves:
        path = sharding.path_of(key_path)
        spec = sharding.param_spec(path, len(leaf.shape))  # raises unless exactly one rule matches
        assert len(spec) == len(leaf.shape)
        if ".stages." in path:
            assert spec[0] is None, f"{path}: the layer axis is never cut"
    for shape in MESHES:
        assert sharding.unsharded(model, abstract_mesh(shape)) == []


def test_memory_falls_with_fsdp(model):
    """All but the vectors are cut: a device of fsdp=8 holds about an eighth."""

    def per_device(shape):
        mesh = abstract_mesh(shape)
        return sum(
            np.prod(s.shard_shape(leaf.shape))
            for s, leaf in zip(
                jax.tree.leaves(sharding.param_shardings(model, mesh)), jax.tree.leaves(model), strict=True
            )
        )

    total = per_device((1, 1, 1))
    assert total == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert per_device((1, 8, 1)) < 1.02 * total / 8
    assert per_device((1, 4, 2)) < 1.02 * total / 8
    assert per_device((2, 4, 1)) < 1.02 * total / 4


@pytest.mark.parametrize(
    "variant",
    [
        {"up": "mlp"},
        {"ffn_multiplier": 4},
        {"residual_gate": "tanh", "init": "torch_default"},
        {"feature_norm": "joint"},
        {"self_attention": False},
        {"shared_weights": True},
        {"interaction": "global"},
        {"interaction": "deformable"},
    ],
)
def test_every_variant_of_vision_remember_is_in_the_table(variant):
    tree = with_vision_remember(QWEN2["0.5B"], **variant)
    assert sharding.unsharded(tree, abstract_mesh((1, 4, 2))) == []


@pytest.mark.parametrize("text", QWEN2)
@pytest.mark.parametrize(
    "refusion",
    [SvaConfig(), DeepStackConfig(), DeepStackConfig(merger="qwen3_vl")],
    ids=["sva", "pool_mlp", "qwen3_vl"],
)
def test_refusion_is_in_the_table_and_divides(text, refusion):
    config = VlmConfig(decoder=QWEN2[text], refusion=refusion)
    tree = abstract_model(config)
    for shape in MESHES:
        assert sharding.unsharded(tree, abstract_mesh(shape)) == []
    cut = {
        sharding.path_of(key_path)
        for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree.refusion)
        if any(sharding.param_spec("refusion." + sharding.path_of(key_path), len(leaf.shape)))
    }
    kernels = {path for path in params_paths(tree.refusion) if path.endswith("kernel")}
    assert kernels <= cut


def params_paths(tree):
    return {sharding.path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("text", QWEN2)
@pytest.mark.parametrize("name", registry.names("projector"))
def test_every_projector_is_in_the_table_and_divides(name, text):
    config = VlmConfig(decoder=QWEN2[text], projector=registry.method("projector", name)())
    tree = {"projector": abstract_projector(config)}
    for shape in MESHES:
        assert sharding.unsharded(tree, abstract_mesh(shape)) == []
    mesh = abstract_mesh((1, 8, 1))
    shardings = sharding.param_shardings(tree, mesh)
    cut = sum(
        np.prod(s.shard_shape(leaf.shape))
        for s, leaf in zip(jax.tree.leaves(shardings), jax.tree.leaves(tree), strict=True)
    )
    assert cut < 1.05 * sum(leaf.size for leaf in jax.tree.leaves(tree)) / 8


def test_so400m_is_in_the_table():
    vision = SiglipConfig(hidden_size=1152, intermediate_size=4304, num_layers=27, patch_size=14)
    config = VlmConfig(encoder=vision, projector=MlpConfig())
    tree = abstract_model(config)
    assert sharding.unsharded(tree, abstract_mesh((1, 8, 2))) == []


def test_an_axis_that_does_not_divide_is_listed_and_kept_whole():
    mesh = sharding.make_mesh(fsdp=8)
    tree = {"projector.fc1.kernel": jax.ShapeDtypeStruct((12, 16), jnp.float32)}
    assert sharding.param_shardings(tree, mesh)["projector.fc1.kernel"].spec == P(None, "tensor")
    (line,) = sharding.unsharded(tree, mesh)
    assert line == "projector.fc1.kernel (12, 16): axis 0 is not divisible by fsdp=8"


def test_a_parameter_unknown_to_the_table_is_named():
    with pytest.raises(sharding.ShardingError, match=r"'decoder\.stages\.0\.novel'.*no rule"):
        sharding.param_spec("decoder.stages.0.novel", 2)
    with pytest.raises(sharding.ShardingError, match=r"has 2 axes, rule .* needs 3"):
        sharding.param_spec("decoder.stages.0.mlp.up.kernel", 2)


class TestConstrain:
    x = jnp.arange(8.0 * 6 * 4).reshape(8, 6, 4)

    def test_is_a_no_op_without_a_mesh(self):
        assert sharding.constrain(self.x, "batch", "seq", "heads") is self.x
        jaxpr = jax.make_jaxpr(lambda x: sharding.constrain(x, "batch", None, "heads"))(self.x)
        assert not jaxpr.jaxpr.eqns

    def test_cuts_by_logical_names(self):
        mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
        with jax.set_mesh(mesh):
            y = jax.jit(lambda x: sharding.constrain(2 * x, "batch", "seq", "heads"))(self.x)
        assert y.sharding.shard_shape(y.shape) == (2, 6, 2)
        np.testing.assert_array_equal(y, 2 * self.x)

    def test_leaves_an_axis_whole_that_does_not_divide(self):
        with jax.set_mesh(sharding.make_mesh(fsdp=4, tensor=2)):
            y = jax.jit(lambda x: sharding.constrain(2 * x, "batch", None, "heads"))(self.x[:1])
        assert y.sharding.shard_shape(y.shape) == (1, 6, 2)

    def test_rejects_unknown_names_and_wrong_counts(self):
        with pytest.raises(sharding.ShardingError, match="'bach'"):
            sharding.constrain(self.x, "bach", None, None)
        with pytest.raises(sharding.ShardingError, match="expected 3 names"):
            sharding.constrain(self.x, "batch", None)


def test_rows_of_a_table_are_taken_alike_on_every_mesh():
    """Where all three axes have several devices, each looks up its own part within a replica; else XLA does."""
    rng = np.random.default_rng(0)
    table, index = rng.normal(size=(16, 8)).astype(np.float32), rng.integers(0, 16, (8, 3))

    def gradient(index, table):
        return jax.grad(lambda table: jnp.sum(jnp.sin(sharding.take_rows(table, index))))(table)

    expected, tree = gradient(index, table), {"decoder.embed.embedding": table}
    for shape in [(2, 2, 2), (4, 2, 1)]:
        mesh = sharding.make_mesh(*shape)
        with jax.set_mesh(mesh):
            placed = jax.device_put(tree, sharding.param_shardings(tree, mesh))
            rows = jax.device_put(index, sharding.batch_sharding(mesh))
            found = jax.jit(sharding.sum_over_replicas(gradient))(rows, placed["decoder.embed.embedding"])
        np.testing.assert_allclose(found, expected, atol=1e-6)


class TestSumOverReplicas:
    x, w = jnp.arange(16.0 * 4).reshape(16, 4) / 10, jnp.ones((4, 8))

    @staticmethod
    def gradient(x, w):
        def add(total, part):
            return total + jax.grad(lambda w: jnp.sum(jnp.sin(part @ w)))(w), None

        parts = sharding.constrain(jnp.moveaxis(x.reshape(-1, 2, x.shape[1]), 1, 0), None, "batch", None)
        return jax.lax.scan(add, jnp.zeros_like(w), parts)[0]

    @pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (8, 1, 1)])
    def test_the_sum_is_that_over_all_rows(self, shape):
        with jax.set_mesh(sharding.make_mesh(*shape)):
            found = jax.jit(sharding.sum_over_replicas(self.gradient))(self.x, self.w)
        np.testing.assert_allclose(found, self.gradient(self.x, self.w), rtol=1e-5)

    def test_without_a_mesh_it_calls_the_function(self):
        np.testing.assert_array_equal(
            sharding.sum_over_replicas(self.gradient)(self.x, self.w), self.gradient(self.x, self.w)
        )

    def test_replicas_meet_once_and_behind_the_loop(self):
        """XLA alone meets in each round of the loop; the loop has two."""

        def met(function):
            mesh = sharding.make_mesh(2, 4, 1, slices=2)
            w = jax.device_put(self.w, sharding.NamedSharding(mesh, P("fsdp")))
            with jax.set_mesh(mesh):
                x = jax.device_put(self.x, sharding.batch_sharding(mesh))
                compiled = jax.jit(function, out_shardings=w.sharding).lower(x, w).compile()
            return program_costs(compiled.as_text(), (0,) * 4 + (1,) * 4).across

        # A device has 4 * 8 / 4 float32 of the gradient, and an all-reduce of two sends as many.
        assert dict(met(sharding.sum_over_replicas(self.gradient))) == {("all-reduce", 2): 8 * 4}
        assert sum(met(self.gradient).values()) >= 2 * 8 * 4

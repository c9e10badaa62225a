"""The messages of the service inference.GRPCInferenceService, built from a table when this is imported.

Field numbers are the protocol's, and Triton's where it has more. They are in a pool of their own: a program that has
loaded KServe's or Triton's own definitions too keeps them.

Source: the Open Inference Protocol's grpc_predict_v2.proto; Triton's grpc_service.proto.
"""

from __future__ import annotations

import re
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

# Message: fields, each its type and its number. "*" repeats, "map" has texts as keys, "|" is one of several choices.
# What KServe and Triton number differently, a model's name to load, is told apart where it is read.
TABLE = """
ServerLiveRequest:
ServerLiveResponse: live bool 1
ServerReadyRequest:
ServerReadyResponse: ready bool 1
ModelReadyRequest: name string 1, version string 2
ModelReadyResponse: ready bool 1
ServerMetadataRequest:
ServerMetadataResponse: name string 1, version string 2, extensions *string 3
ModelMetadataRequest: name string 1, version string 2
ModelMetadataResponse: name string 1, versions *string 2, platform string 3, inputs *TensorMetadata 4, \
    outputs *TensorMetadata 5
TensorMetadata: name string 1, datatype string 2, shape *int64 3
ModelInferRequest: model_name string 1, model_version string 2, id string 3, parameters map:InferParameter 4, \
    inputs *InferInputTensor 5, outputs *InferRequestedOutputTensor 6, raw_input_contents *bytes 7
InferInputTensor: name string 1, datatype string 2, shape *int64 3, parameters map:InferParameter 4, \
    contents InferTensorContents 5
InferRequestedOutputTensor: name string 1, parameters map:InferParameter 2
ModelInferResponse: model_name string 1, model_version string 2, id string 3, parameters map:InferParameter 4, \
    outputs *InferOutputTensor 5, raw_output_contents *bytes 6
InferOutputTensor: name string 1, datatype string 2, shape *int64 3, parameters map:InferParameter 4, \
    contents InferTensorContents 5
ModelStreamInferResponse: error_message string 1, infer_response ModelInferResponse 2
InferParameter: bool_param |bool 1, int64_param |int64 2, string_param |string 3, double_param |double 4, \
    uint64_param |uint64 5
InferTensorContents: bool_contents *bool 1, int_contents *int32 2, int64_contents *int64 3, uint_contents *uint32 4, \
    uint64_contents *uint64 5, fp32_contents *float 6, fp64_contents *double 7, bytes_contents *bytes 8
RepositoryIndexRequest: repository_name string 1, ready bool 2
RepositoryIndexResponse: models *ModelIndex 1
ModelIndex: name string 1, version string 2, state string 3, reason string 4
ModelRepositoryParameter: bool_param |bool 1, int64_param |int64 2, string_param |string 3, bytes_param |bytes 4
RepositoryModelLoadRequest: repository_name string 1, model_name string 2, parameters map:ModelRepositoryParameter 3
RepositoryModelLoadResponse: model_name string 1, isLoaded bool 2
RepositoryModelUnloadRequest: repository_name string 1, model_name string 2, parameters map:ModelRepositoryParameter 3
RepositoryModelUnloadResponse: model_name string 1, isUnloaded bool 2
"""
_FIELD = re.compile(r"(\w+) (\*|\||map:)?(\w+) (\d+)")
_Field = descriptor_pb2.FieldDescriptorProto


def _file(*, keyed: bool) -> descriptor_pb2.FileDescriptorProto:
    """The table as a file's descriptor; maps have keys or are, as on the wire, lists of pairs."""
    file = descriptor_pb2.FileDescriptorProto(name="bluejay/open_inference.proto", package=PACKAGE, syntax="proto3")
    for line in TABLE.strip().splitlines():
        name, _, fields = line.partition(":")
        message = file.message_type.add(name=name)
        for field, mark, kind, number in _FIELD.findall(fields):
            if mark == "map:":
                _add_map(message, field, kind, int(number), keyed=keyed)
                continue
            added = _add(message, field, kind, int(number), repeated=mark == "*")
            if mark == "|":
                if not message.oneof_decl:
                    message.oneof_decl.add(name="parameter_choice")
                added.oneof_index = 0
    return file


def _add(message: Any, name: str, kind: str, number: int, *, repeated: bool = False) -> Any:
    label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if kind[0].isupper():
        return message.field.add(
            name=name, number=number, label=label, type=_Field.TYPE_MESSAGE, type_name=f".{PACKAGE}.{kind}"
        )
    return message.field.add(name=name, number=number, label=label, type=getattr(_Field, f"TYPE_{kind.upper()}"))


def _add_map(message: Any, name: str, kind: str, number: int, *, keyed: bool) -> None:
    """A map is, on the wire, a repeated message of key and value."""
    entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
    entry.options.map_entry = keyed
    _add(entry, "key", "string", 1)
    _add(entry, "value", kind, 2)
    _add(message, name, f"{message.name}.{entry.name}", number, repeated=True)


def _classes(*, keyed: bool) -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file(keyed=keyed))
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in re.findall(r"^(\w+):", TABLE, re.MULTILINE)
    }


MESSAGES = _classes(keyed=True)
# What strangers send is read with these: to put 300,000 keys into a map takes 2 s and cannot be interrupted, a list of
# as many pairs is there in 30 ms and can be counted first.
RECEIVED = _classes(keyed=False)

import grpc
import pytest

from service import errors


@pytest.mark.parametrize("error", errors.RequestError.__subclasses__())
def test_every_refusal_has_a_status_a_code_and_a_type(error):
    codes = errors.ERROR_CODES[error]
    assert 400 <= codes.http < 600
    assert grpc.StatusCode[codes.grpc] is not grpc.StatusCode.OK
    assert codes.error_type == codes.error_type.lower()


def test_error_types_tell_errors_apart():
    names = [codes.error_type for codes in errors.ERROR_CODES.values()]
    assert len(set(names)) == len(names)

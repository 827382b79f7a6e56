"""What requests to the HTTP API are made of."""

import numpy as np

JSON, BINARY = "application/json", "application/octet-stream"
CODES, ARROW = "application/vnd.dpq-rec.codes", "application/vnd.apache.arrow.stream"
ITEMS = "/v1/tables/item_id/lookup"
USERS = "/v1/tables/user_id/lookup"
NAMES = "/v1/tables/name/lookup"


def id_bytes(ids):
    return np.asarray(ids, "<i8").tobytes()

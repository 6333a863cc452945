import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def single_thread():
    """Tensors of a few hundred numbers: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

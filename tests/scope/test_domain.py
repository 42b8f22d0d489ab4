"""`use_domain`: the innermost scope counts, belongs to its thread, and ends also by an exception."""

import threading

import pytest

import bnext
from bnext.errors import DomainError
from bnext.scope import use_domain
from bnext.scope.domain import find_domains_of_batch, get_active_domain


def test_scopes_nest_and_end():
    assert get_active_domain() is None
    with use_domain("day"):
        assert get_active_domain() == "day"
        with use_domain(["night", "day"]):
            assert get_active_domain() == ("night", "day")
        assert get_active_domain() == "day"
    assert get_active_domain() is None


def test_an_exception_ends_the_scope():
    with use_domain("day"):
        with pytest.raises(KeyError), use_domain("night"):
            raise KeyError
        assert get_active_domain() == "day"
    assert get_active_domain() is None


def test_a_scope_belongs_to_its_thread():
    seen = []
    with use_domain("day"):
        thread = threading.Thread(target=lambda: seen.append(get_active_domain()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_names_are_taken_as_they_are_when_the_scope_begins():
    names = ["day", "night"]
    with use_domain(names):
        names.append("fog")
        assert get_active_domain() == ("day", "night")
    with use_domain(name for name in ("day", "fog")):
        assert get_active_domain() == ("day", "fog")


@pytest.mark.parametrize("domain", ["", [], (), [""], ["day", None], [1], ["day", ""], {"day"}, {"day": 1}])
def test_what_is_no_name_is_refused(domain):
    with pytest.raises(DomainError, match=r"domain must be a name, or one name per sample; got .* \(use_domain\)"):
        use_domain(domain).__enter__()
    assert get_active_domain() is None


@pytest.mark.parametrize(
    ("names", "found"), [(["day", None], ("day", "")), ([None, ""], None), (["day", "day"], "day"), (["day"], "day")]
)
def test_records_say_none_by_any_name_for_it(names, found):
    assert find_domains_of_batch([{"domain": name} for name in names]) == found


def test_it_is_public():
    assert bnext.use_domain is use_domain

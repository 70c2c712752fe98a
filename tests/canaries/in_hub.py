"""Bugs in what goes to the Hugging Face Hub and comes from it."""

from canary import Canary

FETCH, SHARE, SETS = (
    f"tests/model/{name}.py" for name in ("hub/test_fetch", "hub/test_share", "prompts/test_hub_sets")
)

CANARIES = [
    Canary(
        "a circuit's repository is compared",
        "cna_kernels/circuit.py",
        "for name, value in known.items() if name.endswith(_HASH) and value is not None}",
        'for name, value in known.items() if name != "name" and value is not None}',
        FETCH,
        "test_repository_and_commit_refuse_no_model",
    ),
    Canary(
        "everything of a repository is fetched",
        "model/hub/fetch.py",
        'SETTINGS = ("*.json",',
        'SETTINGS = ("*",',
        FETCH,
        "test_a_model_by_name",
    ),
    Canary(
        "a public repository is taken for a private one",
        "model/hub/share.py",
        "        if private and not api.repo_info(repo).private:\n",
        "        if False:\n",
        SHARE,
        "test_branches_and_private_repositories",
    ),
    Canary(
        "somebody's card is written over",
        "model/hub/share.py",
        """    if CARD in there and f"\\n- {TAG}\\n" not in""",
        """    if CARD in there and "" not in""",
        SHARE,
        "test_a_card_that_somebody_wrote_stays",
    ),
    Canary(
        "an adapter's settings may say anything",
        "model/hub/contents.py",
        '    fields.only(_FIELDS, "an adapter that cna export writes")\n',
        "",
        SHARE,
        "test_what_is_not_pulled",
    ),
    Canary(
        "all rows of a data set",
        "model/prompts/hub_sets.py",
        "islice(_open(found), found.rows)",
        "iter(_open(found))",
        SETS,
        "test_rows",
    ),
    Canary(
        "a folder here in a data set's place",
        "model/prompts/hub_sets.py",
        "    if os.path.isdir(found.repo):\n",
        "    if False:\n",
        SETS,
        "test_errors",
    ),
]

"""The 296 training tasks of ELM.md: 36 data sets of T0's mixture, prompt by prompt.

Adds a task for each prompt, a mixture for each data set and for each of T0's categories, and ``t0_train``
for all of them; each mixture of several data sets also with other caps. What has no rows below ELM_DATA_DIR
is known by name and left out of the mixtures.

Of ``hotpot_qa/fullwiki`` the paper took 6 prompts of 8 (those of its configs); the other two, and HotpotQA in
KILT's form, in which T0 took it, are there under the role ``extra``.
"""

from elm_jax.tasks.categories import CATEGORIES, CATEGORY_OF
from elm_jax.tasks.facts import Dataset, add_datasets
from elm_jax.tasks.recipes import DATASET_CAP, GENERATION_CAP, PROMPT_CAP, SEEN_ROWS, T0_CAP

from elm_jax.data.registry import registry

DATASETS = (
    Dataset(
        "adversarial_qa", "adversarialQA",
        rank=(),
        generation=(
            "generate_question", "tell_what_it_is", "question_context_answer", "based_on",
            "answer_the_following_q",
        ),
        metrics=("squad_em", "squad_f1"),
    ),
    Dataset(
        "ag_news", None,
        rank=(
            "classify_question_first", "classify_with_choices_question_first", "recommend",
            "which_section_choices", "which_section", "classify_with_choices", "classify",
        ),
        generation=(),
    ),
    Dataset(
        "amazon_polarity", None,
        rank=(
            "Is_this_review", "User_recommend_this_product", "Is_this_product_review_positive",
            "Is_this_review_negative", "convey_negative_or_positive_sentiment",
            "negative_or_positive_tone", "user_satisfied", "would_you_buy", "flattering_or_not",
        ),
        generation=(),
    ),
    Dataset(
        "app_reviews", None,
        rank=(
            "categorize_rating_using_review", "convert_to_star_rating",
        ),
        generation=(
            "generate_review", "convert_to_rating",
        ),
    ),
    Dataset(
        "cnn_dailymail", "3.0.0",
        rank=(),
        generation=(
            "write_an_outline", "news_summary", "2_or_3_sentences", "tldr_summary",
            "news_card_view", "generate_story", "sum_in_brief", "news_stock", "spice_up_story",
        ),
    ),
    Dataset(
        "common_gen", None,
        rank=(),
        generation=(
            "Given concepts - type 2", "Put together",
            "choice in concept centric sentence generation", "random task template prompt",
            "topics from the sentence", "sentence to concepts", "topic to sentence",
            "Example prompt", "Given concepts type 1",
        ),
    ),
    Dataset(
        "commonsense_qa", None,
        rank=(
            "answer_given_question_without_options", "question_answering",
            "question_to_answer_index", "most_suitable_answer",
        ),
        generation=(
            "answer_to_question",
        ),
    ),
    Dataset(
        "cos_e", "v1.11",
        rank=(
            "question_description_option_text", "question_description_option_id",
            "question_option_description_text", "description_question_option_id",
            "description_question_option_text", "question_option_description_id",
        ),
        generation=(
            "rationale", "aligned_with_common_sense", "explain_why_human",
            "generate_explanation_given_text", "i_think",
        ),
    ),
    Dataset(
        "cosmos_qa", None,
        rank=(
            "description_context_question_answer_text", "description_context_question_text",
            "description_context_question_answer_id", "context_description_question_answer_text",
            "no_prompt_id", "context_question_description_text", "no_prompt_text",
            "context_description_question_answer_id", "context_question_description_answer_id",
            "context_description_question_text", "context_question_description_answer_text",
            "only_question_answer",
        ),
        generation=(
            "context_answer_to_question",
        ),
    ),
    Dataset(
        "dbpedia_14", None,
        rank=(
            "given_list_what_category_does_the_paragraph_belong_to",
            "pick_one_category_for_the_following_text", "given_a_choice_of_categories ",
            "given_a_list_of_category_what_does_the_title_belong_to",
        ),
        generation=(),
    ),
    Dataset(
        "dream", None,
        rank=(
            "baseline", "read_the_following_conversation_and_answer_the_question",
        ),
        generation=(
            "generate-last-utterance", "answer-to-dialogue", "generate-first-utterance",
        ),
    ),
    Dataset(
        "duorc", "ParaphraseRC",
        rank=(),
        generation=(
            "build_story_around_qa", "decide_worth_it", "question_answering", "movie_director",
            "generate_question", "extract_answer", "title_generation", "answer_question",
            "generate_question_by_answer",
        ),
        metrics=("squad_em", "squad_f1"),
        references="answers",
    ),
    Dataset(
        "gigaword", None,
        rank=(),
        generation=(
            "generate_summary_for_this", "reverse_writing", "make_a_title",
            "first_sentence_title", "TLDR", "write_its_sentence",
            "write_a_title_for_this_sentence", "in_a_nutshell", "write_an_article",
        ),
    ),
    Dataset(
        "hotpot_qa", "fullwiki",
        rank=(
            "classify_question_type",
        ),
        generation=(
            "generate_answer_affirmative", "generate_answer_and_explanations",
            "generate_explanations_interrogative", "generate_title_affirmative",
            "generate_question", "generate_explanations_affirmative",
            "generate_answer_interrogative",
        ),
        extra=("generate_answer_and_explanations", "generate_explanations_interrogative"),
    ),
    Dataset(
        "imdb", None,
        rank=(
            "Movie Expressed Sentiment 2", "Reviewer Opinion bad good choices",
            "Sentiment with choices ", "Reviewer Sentiment Feeling", "Writer Expressed Sentiment",
            "Movie Expressed Sentiment", "Text Expressed Sentiment", "Reviewer Enjoyment Yes No",
            "Reviewer Expressed Sentiment", "Reviewer Enjoyment",
        ),
        # Its targets are whole phrases, not its choices, so they cannot be ranked.
        generation=(
            "Negation template for positive and negative",
        ),
    ),
    Dataset(
        "glue", "mrpc",
        rank=(
            "want to know", "paraphrase", "equivalent", "replace", "same thing",
        ),
        generation=(
            "generate_paraphrase", "generate_sentence",
        ),
    ),
    Dataset(
        "multi_news", None,
        rank=(),
        generation=(
            "what are the key points", "synthesize", "summary scenario", "summarize",
            "expand (reverse task)", "distill",
        ),
    ),
    Dataset(
        "paws", "labeled_final",
        rank=(
            "task_description-no-label", "Meaning", "context-question-no-label",
            "Rewrite-no-label", "context-question", "Concatenation", "Concatenation-no-label",
            "Meaning-no-label", "PAWS-ANLI GPT3", "Rewrite", "PAWS-ANLI GPT3-no-label",
        ),
        generation=(
            "paraphrase-task",
        ),
    ),
    Dataset(
        "qasc", None,
        rank=(
            "is_correct_1", "qa_with_separated_facts_1", "qa_with_separated_facts_3",
            "qa_with_separated_facts_4", "qa_with_separated_facts_5", "qa_with_combined_facts_1",
            "is_correct_2", "qa_with_separated_facts_2",
        ),
        generation=(),
    ),
    Dataset(
        "glue", "qqp",
        rank=(
            "quora", "duplicate or not", "same thing", "answer", "meaning", "duplicate",
        ),
        generation=(),
    ),
    Dataset(
        "quail", None,
        rank=(
            "context_question_answer_description_id", "context_question_answer_description_text",
            "description_context_question_answer_id", "context_question_description_answer_text",
            "context_question_description_text", "context_description_question_text",
            "context_question_description_answer_id", "no_prompt_id",
            "context_description_question_answer_id", "description_context_question_text",
            "no_prompt_text", "context_description_question_answer_text",
            "description_context_question_answer_text",
        ),
        generation=(),
    ),
    Dataset(
        "quarel", None,
        rank=(
            "do_not_use", "logic_test", "heres_a_story", "choose_between", "testing_students",
        ),
        generation=(),
    ),
    Dataset(
        "quartz", None,
        rank=(
            "use_info_from_question_paragraph", "paragraph_question_plain_concat",
            "use_info_from_paragraph_question", "answer_question_based_on",
            "answer_question_below", "read_passage_below_choose", "having_read_above_passage",
            "given_the_fact_answer_the_q",
        ),
        generation=(),
    ),
    Dataset(
        "quoref", None,
        rank=(),
        generation=(
            "Guess Answer", "Answer Question Given Context", "Find Answer",
            "Context Contains Answer", "Given Context Answer Question", "What Is The Answer",
            "Answer Test", "Guess Title For Context", "Found Context Online",
            "Answer Friend Question", "Read And Extract ",
        ),
        metrics=("squad_em", "squad_f1"),
    ),
    Dataset(
        "ropes", None,
        rank=(),
        generation=(
            "prompt_beginning", "prompt_bottom_no_hint", "prompt_bottom_hint_beginning",
            "given_background_situation", "plain_no_background", "plain_bottom_hint",
            "plain_background_situation", "background_new_situation_answer",
            "background_situation_middle", "new_situation_background_answer", "prompt_mix",
            "read_background_situation",
        ),
        metrics=("squad_em", "squad_f1"),
    ),
    Dataset(
        "rotten_tomatoes", None,
        rank=(
            "Reviewer Opinion bad good choices", "Text Expressed Sentiment",
            "Sentiment with choices ", "Reviewer Enjoyment Yes No", "Reviewer Enjoyment",
            "Movie Expressed Sentiment", "Writer Expressed Sentiment",
            "Movie Expressed Sentiment 2", "Reviewer Expressed Sentiment",
            "Reviewer Sentiment Feeling",
        ),
        generation=(),
    ),
    Dataset(
        "samsum", None,
        rank=(),
        generation=(
            "Summarize this dialogue:", "Given the above dialogue write a summary", "Summarize:",
            "To sum up this dialog", "Generate a summary for this dialogue",
            "Write a dialogue that match this summary", "Sum up the following dialogue",
        ),
    ),
    Dataset(
        "sciq", None,
        rank=(
            "Direct Question (Closed Book)", "Multiple Choice (Closed Book)",
            "Multiple Choice Question First", "Multiple Choice", "Direct Question",
        ),
        generation=(),
        metrics=("acc_norm", "acc_norm_tokens"),
    ),
    Dataset(
        "social_i_qa", None,
        rank=(
            "I was wondering", "Show choices and generate answer",
            "Check if a random answer is valid or not", "Generate answer",
            "Show choices and generate index",
        ),
        generation=(
            "Generate the question from the answer",
        ),
    ),
    Dataset(
        "trec", None,
        rank=(
            "what_category_best_describe", "fine_grained_LOC", "fine_grained_NUM_context_first",
            "fine_grained_ENTY", "fine_grained_NUM", "pick_the_best_descriptor",
            "fine_grained_open_context_first", "fine_grained_LOC_context_first",
            "which_category_best_describes", "fine_grained_DESC", "trec1", "fine_grained_ABBR",
            "fine_grained_ABBR_context_first", "trec2", "fine_grained_HUM", "fine_grained_open",
            "fine_grained_HUM_context_first", "fine_grained_DESC_context_first",
        ),
        generation=(),
    ),
    Dataset(
        "wiki_bio", None,
        rank=(),
        generation=(
            "who",
        ),
    ),
    Dataset(
        "wiki_hop", "original",
        rank=(
            "choose_best_object_interrogative_1", "choose_best_object_affirmative_1",
            "choose_best_object_affirmative_3", "choose_best_object_affirmative_2",
            "choose_best_object_interrogative_2",
        ),
        generation=(
            "explain_relation", "generate_object", "generate_subject",
            "generate_subject_and_object",
        ),
    ),
    Dataset(
        "wiki_qa", None,
        rank=(
            "Is This True?", "automatic_system", "found_on_google", "exercise",
            "Decide_good_answer",
        ),
        generation=(
            "Jeopardy style", "Topic Prediction - Question and Answer Pair",
            "Generate Question from Topic", "Topic Prediction - Question Only",
            "Topic Prediction - Answer Only", "Direct Answer to Question",
        ),
    ),
    Dataset(
        "wiqa", None,
        rank=(
            "effect_with_string_answer", "which_of_the_following_is_the_supposed_perturbation",
            "effect_with_label_answer", "does_the_supposed_perturbation_have_an_effect",
        ),
        generation=(
            "what_might_be_the_first_step_of_the_process",
            "what_might_be_the_last_step_of_the_process", "what_is_the_missing_first_step",
            "what_is_the_final_step_of_the_following_process",
        ),
    ),
    Dataset(
        "xsum", None,
        rank=(),
        generation=(
            "DOC_write_summary_of_above", "article_DOC_summary",
            "DOC_how_would_you_rephrase_few_words", "college_roommate_asked_DOC_so_I_recap",
            "DOC_boils_down_to_simple_idea_that", "summarize_DOC", "summarize_this_DOC_summary",
            "DOC_given_above_write_one_sentence", "read_below_DOC_write_abstract", "DOC_tldr",
        ),
    ),
    Dataset(
        "yelp_review_full", None,
        rank=(
            "so_i_would", "based_on_that", "format_star", "this_place", "format_score",
            "on_a_scale", "format_rating",
        ),
        generation=(),
    ),
)
EXTRA_DATASETS = (
    Dataset(
        "kilt_tasks", "hotpotqa",
        rank=(),
        generation=(
            "complex_question", "combining_facts", "formulate", "final_exam", "straighforward_qa",
        ),
    ),
)
EXTRA_CATEGORIES = {"kilt_tasks_hotpotqa": "closed_book_qa"}
"""T0 sorts HotpotQA there, in KILT's form too."""

SPLITS = ("train", "validation")
CAPS = (GENERATION_CAP, PROMPT_CAP, T0_CAP)
"""Other caps on a data set under which the mixtures of several data sets are there as well."""


def _add_mixtures(tasks: list[str]) -> None:
    """Adds ``t0_<category>`` of each category and ``t0_train`` of all, also with other caps; ``t0_seen``."""
    members = {f"t0_{category}": [task for task in tasks if registry.get_task(task).category == category]
               for category in CATEGORIES}
    members["t0_train"] = tasks
    for name, names in members.items():
        registry.add_mixture(name, names, dataset_cap=DATASET_CAP)
        for cap in CAPS:
            registry.capped_mixture(name, cap, t0_rates=cap == T0_CAP)
    registry.add_mixture("t0_seen", tasks, eval_rows=SEEN_ROWS)


TASKS = add_datasets(DATASETS, role="train", splits=SPLITS, extra_role="extra", categories=CATEGORY_OF)
add_datasets(EXTRA_DATASETS, role="extra", splits=SPLITS, categories=EXTRA_CATEGORIES)
_add_mixtures(TASKS)

"""The groups in which T0 sorts its data sets, those of training and others (Sanh et al. 2022, figure 2)."""

CATEGORIES = {
    "multiple_choice_qa": (
        "commonsense_qa", "cos_e_v1_11", "cosmos_qa", "dream", "qasc", "quail", "quarel", "quartz", "sciq",
        "social_i_qa", "wiki_hop_original", "wiqa",
    ),
    "extractive_qa": ("adversarial_qa_adversarialqa", "duorc_paraphraserc", "quoref", "ropes"),
    "closed_book_qa": ("hotpot_qa_fullwiki", "wiki_qa"),
    "structure_to_text": ("common_gen", "wiki_bio"),
    "sentiment": ("amazon_polarity", "app_reviews", "imdb", "rotten_tomatoes", "yelp_review_full"),
    "summarization": ("cnn_dailymail_3_0_0", "gigaword", "multi_news", "samsum", "xsum"),
    "topic_classification": ("ag_news", "dbpedia_14", "trec"),
    "paraphrase_identification": ("glue_mrpc", "glue_qqp", "paws_labeled_final"),
}
"""From a category to the keys ``<dataset>[_<config>]`` of its data sets."""
CATEGORY_OF = {key: category for category, keys in CATEGORIES.items() for key in keys}
UNSEEN_CATEGORIES = {
    "natural_language_inference": ("anli_r1", "anli_r2", "anli_r3", "super_glue_cb", "super_glue_rte"),
    "sentence_completion": ("hellaswag", "story_cloze_2016", "super_glue_copa"),
    "coreference_resolution": ("super_glue_wsc_fixed", "winogrande_winogrande_xl"),
    "word_sense_disambiguation": ("super_glue_wic",),
}
"""The groups of data sets that are never trained on; priors of a task leave out its whole group."""
UNSEEN_CATEGORY_OF = {key: category for category, keys in UNSEEN_CATEGORIES.items() for key in keys}

"""The groups in which T0 sorts its training data sets (Sanh et al. 2022, figure 2)."""

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
